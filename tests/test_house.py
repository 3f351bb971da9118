"""The structure of the project: who imports whom, how both backends mirror each other, the way to the step."""

import ast
import importlib
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from support.short_runs import SIZE

ROOT = Path(__file__).parents[1]
FOLDERS = ("mlx_moe", "torch_ref", "parity")
FILES = [Path("cli.py"), *sorted(path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
# The packages and modules of mlx_moe, highest layer first. Each imports from lower layers only, never from its own.
LAYERS = (
    ("api", "commands"),
    ("model", "analysis", "convert"),
    ("training",),
    ("inference", "hub", "phases", "presets"),
    ("transfer", "data", "accounting"),
    ("storage", "precision"),
    ("parameters", "rotations"),
    ("arguments", "config"),
    ("architecture", "validation", "terminal", "extras", "address_space"),
    ("errors", "limits", "device", "processes", "kernel_sizes", "html"),
)
MIRRORED = sorted(path.name for path in (ROOT / "torch_ref").glob("*.py"))


def module_name(file):
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imports(file):
    """The full names of all that a file imports anywhere, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_below(name, package):
    return name == package or name.startswith(f"{package}.")


def in_new_python(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file):
    forbidden = {
        "mlx_moe/api.py": ["torch", "mlx", "torch_ref", "mlx_moe.model", "cli"],  # the public face, above all others
        "mlx_moe/model": ["torch", "torch_ref", "parity", "cli"],
        "mlx_moe": ["torch", "mlx", "torch_ref", "mlx_moe.model", "parity", "cli"],
        "torch_ref": ["mlx", "mlx_moe.model", "parity", "cli"],
        "parity/libraries": ["cli"],
        "parity": ["torch", "mlx", "cli"],
        "cli.py": ["torch", "mlx"],
    }
    place = next(place for place in forbidden if file.is_relative_to(place))
    wrong = {name for name in imports(file) for package in forbidden[place] if is_below(name, package)}
    assert not wrong


def layer_of(name):
    """Return the number of a module's layer, from the highest; the package itself, `import mlx_moe`, is above all."""
    part = name.partition(".")[2].partition(".")[0]
    return next((number for number, layer in enumerate(LAYERS) if part in layer), -1)


def test_every_module_is_in_one_layer():
    found = {file.with_suffix("").parts[1] for file in FILES if file.parts[0] == "mlx_moe"} - {"__init__"}
    assert sorted(part for layer in LAYERS for part in layer) == sorted(found)


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "mlx_moe"], ids=str)
def test_imports_lead_to_lower_layers(file):
    """Imports for type checkers count, too."""
    own = module_name(file)
    package = ".".join(own.split(".")[:2])
    names = {name for name in imports(file) if is_below(name, "mlx_moe") and not is_below(name, package)}
    # `from mlx_moe import errors` gives `mlx_moe` beside `mlx_moe.errors`; the latter decides.
    wrong = {name for name in names - {"mlx_moe"} if layer_of(name) <= layer_of(own)}
    assert not wrong


def test_the_listing_shows_the_layers():
    """ARCHITECTURE.md lists what mlx_moe consists of in the order of the layers."""
    listing = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    listed = re.findall(r"^mlx_moe/(\w+)", listing, re.MULTILINE)
    numbers = [layer_of(f"mlx_moe.{part}") for part in listed]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(LAYERS)))


def test_the_floor_loads_no_framework():
    floor = sorted(module_name(file) for file in FILES if file.is_relative_to("mlx_moe") and "model" not in file.parts)
    for part in ("config", "accounting", "parameters", "data", "transfer", "training", "inference"):
        assert any(is_below(name, f"mlx_moe.{part}") for name in floor)
    heavy = ("torch", "mlx", "transformers", "datasets", "mlx_lm")
    code = f"import sys, {', '.join(floor)}; print(*(name for name in {heavy} if name in sys.modules))"
    assert in_new_python(code).split() == []


@pytest.mark.parametrize(("name", "blocked"), [("torch", "mlx"), ("mlx", "torch")])
def test_each_backend_works_without_the_other(name, blocked):
    code = f"""
import sys
sys.modules[{blocked!r}] = None
import numpy as np
from mlx_moe.config import ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import choose_backend
assert choose_backend().name == {name!r}
config = ModelConfig(vocab_size=16, context_length=8, d_model=16, n_layers=1, n_heads=2, moe=MoEConfig(n_experts=4))
trainer = choose_backend({name!r}).trainer(config, initialize(config, 0), OptimizerConfig(), "cpu")
print(trainer.step(np.zeros((2, 9), np.int32), 1e-3, 0)().loss)
try:
    choose_backend({blocked!r})
except InputError:
    print("refused")
"""
    loss, refused = in_new_python(code).split()
    assert 1 < float(loss) < 5
    assert refused == "refused"


# What one backend has and the other has not, or has with other parameters, and why.
UNLIKE = {
    "attention.py": {
        "MLX rotates by a kernel of its own": "rotations _rotation_table",
        "a mask of MLX is added, one of PyTorch chosen": "_visible",
    },
    "device.py": {
        "each has a handle of its own for a device": "torch_device running_on on_its_device",
        "MLX's allocator has a limit": "keep_freed_buffers",
        "PyTorch's products are waited for by reading them": "_wait",
        "PyTorch's tokens are pinned": "to_device",
    },
    "distributed.py": {
        "only PyTorch shards": "shard shard_optimizer local_optimizer full_tensor distribute_like ProcessGroup.sum",
        "DistributedDataParallel is a module": "average_gradients",
        "a tensor of PyTorch may be a slice, on a device": "to_numpy",
    },
    "layers.py": {
        "MLX's is in functional.py, PyTorch's among its functions": "layer_norm",
        "MLX has no modules that draw with a key": "dropout",
        "PyTorch's modules draw weights when they are made": "Linear.reset_parameters",
    },
    "loss.py": {
        "PyTorch knows whether gradients are needed; only its loss is compiled apart": "cross_entropy",
        "gradients by mx.custom_function": "_forward _backward _sum _chunk_size _chunks wait_for",
        "gradients by torch.autograd.Function": (
            "_CrossEntropy _nll_and_gradient _compiled_nll_and_gradient _add_product"
        ),
    },
    "moe.py": {
        "products take groups of rows, or the ends of groups": "ExpertLinear.__call__ Experts.__call__",
        "MLX dispatches in one of two layouts": "Experts._ffn dispatch_sorted",
        "PyTorch's products, and torch.compile around them": (
            "ExpertLinear.stay_out_of_graphs ExpertLinear._products _one_by_one _ExpertProducts _Dispatched _Combined "
            "_dispatched _combined"
        ),
    },
    "optimizers.py": {
        "each library's interface of an optimizer": (
            "Muon.__init__ Muon.step Muon.init_single Muon.apply_single RuledParameter MultiOptimizer"
        ),
        "only PyTorch shards": "build_optimizer",
        "only MLX's new weights stand beside the old ones": "update_groups",
    },
    "step.py": {
        "MLX compiles": "TrainingStep._train_in_one_graph TrainingStep._compile compiled _random_state",
        "DistributedDataParallel averages while it computes gradients": "TrainingStep._without_averaging",
        "PyTorch has it": "global_norm",
    },
    "streaming.py": {
        "PyTorch's arrays move to a device": "StreamedModel._array",
        "MLX runs a generator's steps in contexts, and copies its head by parts": (
            "StreamedModel._run_layer StreamedModel._logits"
        ),
    },
    "trainer.py": {
        "MLX compiles, in a context": "Trainer._build Trainer._freeze Trainer._loss_of _float",
    },
    "transformer.py": {
        "MLX's dropout takes keys": "Block.__call__ Block.attend Block.feed_forward _with_keys",
        "only PyTorch's blocks are compiled, and draw weights when made": "Transformer.compile_blocks _embedding",
    },
    "__init__.py": {"PyTorch's compiler and threads": "place_compiler_cache _cores_are_taken"},
}
SAME_TYPES = {
    r"\b(mx\.array|torch\.Tensor|Tensor)\b": "Array",
    r"\b(mx\.Dtype|torch\.dtype)\b": "Dtype",
    r"\b(mx|torch)\.float32\b": "float32",
}


def signatures(path):
    """Names of all classes, functions and methods with their signatures, in the order of the file."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = "class"
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                name = prefix + {"forward": "__call__"}.get(node.name, node.name)
                returns = ast.unparse(node.returns) if node.returns else None
                signature = f"({ast.unparse(node.args)}) -> {returns}"
                for pattern, same in SAME_TYPES.items():
                    signature = re.sub(pattern, same, signature)
                found[name] = signature

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("file", MIRRORED)
def test_the_backends_mirror_each_other(file):
    """The same functions, classes and methods in the same order with the same signatures, but for those of UNLIKE."""
    mlx_, torch_ = signatures(ROOT / "mlx_moe" / "model" / file), signatures(ROOT / "torch_ref" / file)
    unlike = set(" ".join(UNLIKE.get(file, {}).values()).split())
    for name in unlike:
        assert mlx_.get(name) != torch_.get(name) or mlx_.get(name) == "class", f"{name} is alike by now"

    def mirrored(found):
        return [item for item in found.items() if not {item[0], item[0].partition(".")[0]} & unlike]

    assert mirrored(mlx_) == mirrored(torch_)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_way_to_the_step_is_as_drawn(backend, mlxmoe, monkeypatch, tmp_path):
    """The files that a real command goes through, down to the update of the weights."""

    def update(*_):
        stack = {Path(frame.filename).resolve() for frame in traceback.extract_stack()}
        passed.extend(str(file.relative_to(ROOT)) for file in stack if file.is_relative_to(ROOT))
        raise SystemExit(3)

    passed = []
    step = importlib.import_module({"torch": "torch_ref.step", "mlx": "mlx_moe.model.step"}[backend])
    monkeypatch.setattr(step.TrainingStep, "update", update)
    settings = [f"-o{setting}" for setting in SIZE]
    assert mlxmoe("train", "-p", "demo", *settings, "--backend", backend, "--out", tmp_path / "run").code == 3
    drawn = (ROOT / "ARCHITECTURE.md").read_text().partition("## The way to the step")[2].partition("```\n\n")[0]
    drawn = set(re.findall(r"[\w/]+\.py", drawn))
    other = {"torch": "mlx_moe/model/step.py", "mlx": "torch_ref/step.py"}[backend]
    inside = {file for file in passed if file.startswith(("cli.py", "mlx_moe/", "torch_ref/"))}
    assert inside - {"cli.py"} == drawn - {other}
    assert len(drawn - {other}) <= 4


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [file for file in FILES if drawers & {file.stem, *file.parts}] == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_that_can_run_code_is_read_back(file):
    pickles = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert not pickles & {name.partition(".")[0] for name in imports(file)}
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    readers = {"torch.load", "np.load", "numpy.load", "mx.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    assert not readers & set(calls)
    assert not {"eval", "exec"} & set(calls)


def test_inference_loads_no_compiler():
    loaded = in_new_python(
        "import sys; import numpy as np; from mlx_moe.config import OptimizerConfig;"
        "from mlx_moe.parameters import initialize; from mlx_moe.presets import load_architecture;"
        "from torch_ref.trainer import Trainer;"
        "config = load_architecture('llama', n_layers=1, d_model=32, n_heads=2, vocab_size=32, context_length=8);"
        "model = Trainer(config, initialize(config, 0), OptimizerConfig(), 'cpu');"
        "model.logits(np.zeros((1, 4), np.int32)); model.loss(np.zeros((1, 5), np.int32)); model.decoder();"
        "print('torch._dynamo' in sys.modules); model.optimizer_state(); print('torch._dynamo' in sys.modules)"
    )
    assert loaded.split() == ["False", "True"]


def test_data_is_refused_before_pytorch_loads():
    loaded = in_new_python(
        "import sys; import cli; sys.argv = ['mlxmoe', 'train', '--backend', 'torch', '--data', 'nothing.txt']\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    assert loaded.split() == ["2", "False"]
