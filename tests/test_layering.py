"""Who imports whom: what each part needs to be installed, and what running an explained model costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "onnxcam"
PARTS = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
}
HEAVY = {"numpy", "PIL", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "typer", "rich"}
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
MAIN = """
import sys
sys.argv = ["onnxcam", *{arguments!r}]
from onnxcam.cli import main
try:
    main()
finally:
    print("LOADED", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def onnxcam(*arguments, hidden=()):
    """Run a command and return its exit code, output, errors and the modules it loaded."""
    done = python(HIDE.format(hidden=set(hidden)) + MAIN.format(arguments=list(map(str, arguments))))
    out, _, loaded = done.stdout.partition("LOADED")
    return done.returncode, out, done.stderr, set(loaded.split())


def imported(path, everywhere=True):
    """Names of the modules that a file imports: anywhere in it, or only when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(part, *modules, everywhere=True):
    return {
        name
        for name in imported(PARTS[part], everywhere)
        if any(name == module or name.startswith(module + ".") for module in modules)
    }


def reads(part):
    """All the parts of onnxcam that come in when `part` is imported."""
    found, left = set(), [part]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        path = PARTS.get(name) or PARTS.get(f"{name}.__init__")
        if path is not None:
            left += [other for other in imported(path, everywhere=False) if other.startswith("onnxcam")]
    return found - {part}


def test_importing_the_package_imports_nothing_heavy():
    done = python("import onnxcam, sys; print(*{name.partition('.')[0] for name in sys.modules})")
    assert done.returncode == 0, done.stderr
    assert "onnxcam" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


def test_help_and_version_need_no_model_library():
    for option in ("--help", "--version"):
        code, out, _, loaded = onnxcam(option)
        assert code == 0
        assert "onnxcam" in out or "Usage" in out
        assert not (HEAVY - {"typer", "rich"}) & loaded


def test_running_an_explained_model_loads_neither_onnx_nor_torch(small_explained, photo, tmp_path):
    code, out, err, loaded = onnxcam("run", small_explained, photo, "--output", tmp_path, "--class", "top2")
    assert (code, err) == (0, "")
    assert "all in one" in out
    assert {"onnxruntime", "numpy", "PIL"} <= loaded
    assert not loaded & {"onnx", "onnx_ir", "onnxscript", "google", "torch", "rich", "scipy", "matplotlib"}


def test_only_exporting_imports_torch():
    for part, path in PARTS.items():
        names = {name.partition(".")[0] for name in imported(path)}
        if part != "onnxcam.exporting":
            assert not names & {"torch", "torchvision", "onnxscript", "safetensors"}, part


@pytest.mark.parametrize("part", ["card", "errors", "image", "render", "runtime", "cli"])
def test_run_side_imports_no_build_side(part):
    name = f"onnxcam.{part}"
    build_side = {
        "onnxcam.attaching",
        "onnxcam.onnxfile",
        "onnxcam.exporting",
        "onnxcam.emit",
        "onnxcam.layers",
    }
    assert not reads(name) & build_side
    for other in {name, *reads(name)} & PARTS.keys():
        assert not imports(other, "onnx", "onnx_ir", "google", everywhere=False)
    if part in ("card", "errors"):
        assert not imports(name, "numpy", "PIL", "onnxruntime")
    if part not in ("runtime", "cli"):
        assert not imports(name, "onnxruntime")


def test_methods_know_no_gradient_and_gradients_no_method():
    for part in PARTS:
        if part.startswith("onnxcam.methods"):
            assert not imports(part, "onnxcam.vjp", "onnxcam.backward", "onnxcam.seed"), part
        if part.startswith("onnxcam.vjp"):
            assert not imports(part, "onnxcam.methods", "onnxcam.attaching", "onnxcam.backward"), part


def test_emit_imports_nothing_of_ours():
    assert imports("onnxcam.emit", "onnxcam") <= {"onnxcam.errors", "onnxcam.errors.OnnxcamError"}


def test_no_private_part_of_a_dependency():
    for part, path in PARTS.items():
        for name in imported(path) - {"__future__"}:
            own = name.startswith("onnxcam")
            assert own or not any(piece.startswith("_") for piece in name.split(".")), (part, name)
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                owner = ast.unparse(node.value)
                assert owner.partition(".")[0] not in {"ir", "onnx", "torch", "np", "Image"}, (part, owner)


def test_without_torch_all_but_exporting_works(small, photo, tmp_path):
    hidden = {"torch", "onnxscript", "safetensors"}
    explained = tmp_path / "explained.onnx"
    facts = ["--color", "rgb", "--scale", "1/255", "--mean", "0.5", "--std", "0.5", "--resize", "stretch"]
    for arguments in (
        ["attach", small, "-o", explained, *facts],
        ["layers", small],
        ["run", explained, photo, "-o", tmp_path / "a"],
        ["run", small, photo, "-o", tmp_path / "b", *facts],
    ):
        code, out, err, _ = onnxcam(*arguments, hidden=hidden)
        assert (code, err) == (0, ""), arguments
        assert out


def test_without_onnxruntime_attaching_works_and_running_says_how_to_install_it(
    small, small_explained, photo, tmp_path
):
    code, _, err, _ = onnxcam("attach", small, "-o", tmp_path / "x.onnx", hidden={"onnxruntime"})
    assert (code, err) == (0, "")
    code, out, err, _ = onnxcam("run", small_explained, photo, "-o", tmp_path / "a", hidden={"onnxruntime"})
    assert (code, out) == (2, "")
    assert err == (
        "onnxcam: onnxruntime is not installed; "
        "install it with: pip install 'onnxcam[cpu]' (or 'onnxcam[gpu]')\n"
    )
    assert not (tmp_path / "a").exists()


def test_exporting_without_torch_says_how_to_install_it(tmp_path):
    arguments = ("export", "somewhere:factory", "-o", tmp_path / "x.onnx")
    code, out, err, _ = onnxcam(*arguments, hidden={"torch"})
    assert (code, out) == (2, "")
    assert err == (
        "onnxcam: exporting from PyTorch needs torch; install it with: pip install 'onnxcam[export]'\n"
    )


def test_public_names_come_when_they_are_asked_for():
    import onnxcam

    for name in onnxcam.__all__:
        assert getattr(onnxcam, name).__doc__
    assert set(onnxcam.__all__) <= set(dir(onnxcam))
    with pytest.raises(AttributeError, match="has no attribute 'attache'"):
        _ = onnxcam.attache
