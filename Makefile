PYTHON ?= python3
FACTS = --color rgb --scale 1 --mean 127 --std 128 --resize stretch --interpolation bicubic \
        --labels models/imagenet_labels.txt

.PHONY: demo test test-deploy check docs parity parity-check bench bench-quick bench-why runtimes zoo web test-web clean

# Explains a real photo with a real model; needs no PyTorch.
demo: .venv/ready
	mkdir -p demo
	.venv/bin/onnxcam attach models/efficientnet_lite0.onnx -o demo/explained.onnx $(FACTS)
	.venv/bin/onnxcam run demo/explained.onnx models/cat_and_coffee.png \
	    --class "Egyptian cat" --class espresso --output demo

# A process for each core, up to 4 because each takes 2 to 3 GB, and one thread in each.
test: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The JavaScript of docs/deploy.md, in Node.
test-deploy: .venv/ready build/deploy/node_modules
	.venv/bin/python docs/deploy.py build/deploy

build/deploy/node_modules:
	mkdir -p build/deploy
	npm install --prefix build/deploy --ignore-scripts --no-audit --no-fund --silent onnxruntime-web@1.30.0

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

# What explaining costs, against the goals; writes benchmarks/results.md. An hour, on a machine that does
# nothing else.
bench: .venv-test/ready
	.venv-test/bin/python -W ignore -m benchmarks.bench

# Where the time goes, and how it grows; writes benchmarks/profiles.md, benchmarks/growth.md and docs/growth.png.
bench-why: .venv-test/ready
	.venv-test/bin/python -W ignore -m benchmarks.profiles
	.venv-test/bin/python -W ignore -m benchmarks.growth

bench-quick: .venv-test/ready
	.venv-test/bin/python -W ignore -m benchmarks.bench --quick

# Explained models in other runtimes; writes docs/runtimes.md. Hours, most of them WebGPU's; it goes on where it
# stopped. Needs Node, npm and Debian's chromium beside what it installs.
runtimes: .venv-runtimes/ready
	.venv-runtimes/bin/python -m benchmarks.runtimes .venv-runtimes/web

# The pages that are printed by the program.
docs: .venv-test/ready
	.venv-test/bin/python docs/cli.py > docs/cli.md
	.venv-test/bin/python docs/colors.py > web/colors.js

# Completes the page in web/ with onnxruntime-web from npm and the demo's model; any file server can serve it then.
web: .venv/ready
	.venv/bin/onnxcam web --fetch
	mkdir -p web/models
	.venv/bin/onnxcam attach models/efficientnet_lite0.onnx -o web/models/efficientnet_lite0.onnx $(FACTS) \
	    --embed-preprocess --class-input required
	echo '[{"name": "EfficientNet-Lite0", "path": "efficientnet_lite0.onnx"}]' > web/models/index.json

# The page in a real browser.
test-web: .venv-test/ready web /usr/bin/chromium
	.venv-test/bin/pip install --quiet --disable-pip-version-check -r tests_web/requirements.txt
	.venv-test/bin/python -m pytest tests_web

/usr/bin/chromium:
	apt-get update --quiet
	apt-get install --quiet --yes --no-install-recommends chromium

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

.venv-runtimes/ready: benchmarks/runtimes/requirements.txt
	$(PYTHON) -m venv .venv-runtimes
	.venv-runtimes/bin/pip install --quiet --disable-pip-version-check -e . -r benchmarks/runtimes/requirements.txt
	npm install --silent --prefix .venv-runtimes/web onnxruntime-web@1.30.0
	touch $@

clean:
	rm -rf .venv .venv-test .venv-runtimes demo build *.egg-info web/ort web/models tests_web/seen
