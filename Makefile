PYTHON ?= python3
FACTS = --color rgb --scale 1 --mean 127 --std 128 --resize stretch --interpolation bicubic \
        --labels models/imagenet_labels.txt

.PHONY: demo test check docs parity parity-check zoo clean

# Explains a real photo with a real model; needs no PyTorch.
demo: .venv/ready
	mkdir -p demo
	.venv/bin/onnxcam attach models/efficientnet_lite0.onnx -o demo/explained.onnx $(FACTS)
	.venv/bin/onnxcam run demo/explained.onnx models/cat_and_coffee.png \
	    --class "Egyptian cat" --class espresso --output demo

test: .venv-test/ready
	.venv-test/bin/python -m pytest

check: .venv-test/ready
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

# How far the maps are from those of pytorch-grad-cam, torch-cam and captum; writes docs/parity.md.
parity: .venv-test/ready
	.venv-test/bin/python -m benchmarks.parity docs/parity.md

# The same measurement against the bounds in benchmarks/parity.py; writes nothing.
parity-check: .venv-test/ready
	.venv-test/bin/python -m benchmarks.parity

# The pages that are printed by the program.
docs: .venv-test/ready
	.venv-test/bin/python docs/cli.py > docs/cli.md

# Every classifier of torchvision and one of each family of timm against torch; hours. It goes on where it stopped.
zoo: .venv-test/ready
	.venv-test/bin/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31
	.venv-test/bin/python -m benchmarks.zoo

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[cpu]'
	touch $@

# torch comes first, pinned: the CPU build of what follows must not be replaced by a newer one.
.venv-test/ready: pyproject.toml tests/requirements.txt tests/requirements-peers.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-test/bin/pip install --quiet --disable-pip-version-check -e '.[cpu,export]' -r tests/requirements.txt
	.venv-test/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-peers.txt
	touch $@

clean:
	rm -rf .venv .venv-test demo build *.egg-info
