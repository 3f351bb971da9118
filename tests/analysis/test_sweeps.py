import pytest
import yaml

from mlx_moe.analysis.sweeps import budget, expand, load_sweep, sweep_names
from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.phases import phase_config
from mlx_moe.presets import preset_names

SWEEP = {
    "name": "s",
    "preset": "demo",
    "overrides": {"data.n_documents": 100, "phases.dense.steps": 40, "phases.moe.steps": 60},
    "axes": {
        "model.d_model": [32, 64],
        "arm": {
            "first": {"n_phases": 2},
            "tokens": {"equal": {"tokens": "first"}},
            "flops": {"equal": {"flops": "first"}},
        },
        "seed": [0, 1],
    },
}


def written(tmp_path, sweep):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    return load_sweep(str(file))


def spent(run, kind):
    steps = [phase_config(run.config, phase).steps for phase in range(1, run.n_phases + 1)]
    return sum(n * each for n, each in zip(steps, budget(run, kind), strict=True))


def test_every_combination_is_a_run(tmp_path):
    planned = expand(written(tmp_path, SWEEP), ["training.batch_size=4", "model.d_model=999"])
    assert [run.name for run in planned[:3]] == [
        "d_model=32,first,seed=0",
        "d_model=32,first,seed=1",
        "d_model=32,tokens,seed=0",
    ]
    assert len(planned) == len({run.name for run in planned}) == 12
    for run in planned:
        assert run.config.model.d_model == run.choices["model.d_model"]
        assert run.config.seed == run.choices["seed"]
        assert run.config.training.batch_size == 4
        assert run.n_phases == (2 if run.choices["arm"] == "first" else 1)


@pytest.mark.parametrize("kind", ["tokens", "flops"])
def test_equal_budgets_are_equal_to_a_step(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    planned = {run.name: run for run in expand(written(tmp_path, SWEEP))}
    for width in (32, 64):
        reference, run = (planned[f"d_model={width},{arm},seed=0"] for arm in ("first", kind))
        reference = reference if kind == "tokens" else with_vocabulary_of(reference, run)
        assert abs(spent(reference, kind) - spent(run, kind)) <= budget(run, kind)[-1]
    assert planned["d_model=32,tokens,seed=0"].config.phases["dense"].steps == 100


def with_vocabulary_of(reference, run):
    from dataclasses import replace

    vocabulary = {"vocab_size": run.config.model.vocab_size}
    model = reference.config.model.model_copy(update=vocabulary)
    return replace(reference, config=reference.config.model_copy(update={"model": model}))


@pytest.mark.parametrize("name", sweep_names())
def test_every_sweep_that_is_shipped_is_valid(name, tmp_path, monkeypatch, shakespeare):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path))
    sweep = load_sweep(name)
    if sweep.preset not in preset_names("runs"):
        pytest.skip(f"no preset {sweep.preset} yet")
    small = ["data.n_documents=200"] if sweep.preset == "demo" else [f"data.source={shakespeare}"]
    planned = expand(sweep, small)
    assert len(planned) >= 4
    assert sweep.name == name


def test_components_has_each_of_the_nine_options():
    variants = load_sweep("components").axes["component"].values()
    assert {key for variant in variants for key in variant} == {
        *(f"model.{key}" for key in ("normalization", "activation", "position_encoding", "attention_backend")),
        *(f"model.{key}" for key in ("norm_position", "ffn_type", "bias", "weight_tying", "dropout")),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axis": {}}, "unknown key 'axis'; did you mean 'axes'?"),
        ({"axes": {}}, "axes"),
        ({"preset": "dmo"}, "run d_model=32,first,seed=0: no preset named 'dmo'; did you mean 'demo'?"),
        ({"axes": {"model.d_modle": [1]}}, "run d_modle=1: unknown key 'model.d_modle'; did you mean 'd_model'?"),
        ({"axes": {"a": {"b": {"n_phases": 4}}}}, "run b: n_phases 4; must be from 1 to 3"),
        ({"axes": {"a": {"b": {"equal": {"tokens": "c"}}}}}, "run b: equal {'tokens': 'c'} must be tokens or flops"),
        (
            {"axes": {"a": {"b": {"phases.dense.steps": 9}, "c": {"n_phases": 2, "equal": {"tokens": "b"}}}}},
            "run c: its first phases take more tokens than b in all",
        ),
    ],
)
def test_faults_are_named(change, said, tmp_path):
    with pytest.raises(InputError) as error:
        expand(written(tmp_path, SWEEP | change))
    assert said in str(error.value)


BASE = {"phases.dense.steps": 9}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({f"model.x{i}": list(range(1000)) for i in range(3)}, "the axes make 1,000,000,000 runs"),
        ({"seed": list(range(1001))}, "the axes make 1,001 runs, and a sweep has 1,000 at most"),
        ({"seed": []}, "axis 'seed' must be a list of values or a mapping of variants"),
        ({"seed": 3}, "axis 'seed' must be a list"),
        ({"arm": {}}, "axis 'arm' must be a list"),
        ({"arm": None}, "axis 'arm' must be a list"),
        ({"arm": {"a": 3}}, "axis 'arm': the variant 'a' must be a mapping"),
        ({"arm": {"a": {1: 2}}}, "axis 'arm': the variant 'a' must be a mapping"),
        ({"arm": {1: {}}}, "axis 'arm': the variant 1 must have a text as its name"),
        ({"seed": [1, 2, 1]}, "axis 'seed' has 1 twice"),
        ({"seed": [1, "1"]}, "axis 'seed' has 1 twice"),
        ({"seed": [[1, 2]]}, "run seed=[1, 2]: seed = [1, 2]: input should be a valid integer"),
        ({"seed": ["2024-13-01"]}, "run seed=2024-13-01: seed = "),
        ({"phases.dense.learning_rate": [float("nan")]}, "nan holds a number that is not finite"),
        ({"arm": {"a": {"optimizer.betas": [0.9, float("inf")]}}}, "a holds a number that is not finite"),
        ({"arm": {"": {}}}, "the variant's name '' is empty"),
        ({"arm": {"..": {}}}, "the variant's name '..' begins with a dot"),
        ({"arm": {"logs": {}}}, "the variant's name 'logs' is what something else"),
        ({"arm": {"Sweep.JSON": {}}}, "is what something else"),
        ({"arm": {"a.failed": {}}}, "is what something else"),
        ({"arm": {"../x": {}}}, "begins with a dot"),
        ({"arm": {"a/b": {}}}, "holds a slash"),
        ({"arm": {"a\\b": {}}}, "holds a slash"),
        ({"arm": {"-a": {}}}, "the variant's name '-a' begins with a dot or a dash"),
        ({"arm": {" a": {}}}, "begins or ends with a blank"),
        ({"arm": {"a\0b": {}}}, "a control character"),
        ({"arm": {"a\x1b[2Jb": {}}}, "a control character"),
        ({"arm": {"a\nb": {}}}, "a control character"),
        ({"arm": {"é" * 121: {}}}, "has 242 bytes, and at most 240 are possible"),
        ({"data.text_field": ["x" * 300]}, "bytes, and at most 240 are possible"),
        ({"arm": {"a": {}, "A": {}}}, "runs 'a' and 'A' would share a folder"),
        ({"arm": {"é": {}, "e\u0301": {}}}, "would share a folder"),
        ({"data.text_field": ["a/b", "a_b"]}, "would share a folder"),
        ({"x": {"a,b": {}, "a": {}}, "y": {"c": {}, "b,c": {}}}, "would share a folder"),
        ({"arm": {"a": {"equal": 3}}}, "run a: equal 3 must be tokens or flops"),
        ({"arm": {"a": {"equal": {}}}}, "run a: equal {} must be"),
        ({"arm": {"a": {"equal": {"flops": 7}}}, "seed": [7]}, "run a,seed=7: equal {'flops': 7} must be"),
        ({"arm": {"a": {"equal": {"time": "b"}}, "b": {}}}, "run a: equal {'time': 'b'} must be"),
        ({"arm": {"a": {"equal": {"tokens": "a"}}}}, "run a: equal {'tokens': 'a'} must be"),
        ({"arm": {"a": {"n_phases": "x"}}}, "run a: n_phases 'x'; must be from 1 to 3"),
        ({"arm": {"a": {"n_phases": True}}}, "run a: n_phases True; must be from 1 to 3"),
        ({"arm": {"a": {"n_phases": [1]}}}, "run a: n_phases [1]; must be"),
    ],
)
def test_axes_that_are_none_are_refused_at_once(axes, said, mlxmoe, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"name": "s", "preset": "demo", "overrides": BASE, "axes": axes}, sort_keys=False))
    result = mlxmoe("sweep", file, "--out", tmp_path / "out")
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "..", ".", "../x", "a/b", "/tmp/x", "a\0", "x" * 300])
def test_a_name_that_no_folder_can_have(name, tmp_path):
    with pytest.raises(InputError, match="it is the name of the sweep's folder"):
        written(tmp_path, SWEEP | {"name": name})


def test_a_slash_in_a_value_is_none_in_the_name(tmp_path):
    (run,) = expand(written(tmp_path, SWEEP | {"axes": {"data.tokenizer": ["owner/name"]}}))
    assert (run.name, run.config.data.tokenizer) == ("tokenizer=owner_name", "owner/name")


def test_a_sweep_that_is_not_there():
    with pytest.raises(InputError, match=r"no sweep 'widht': did you mean 'width'\? known: components"):
        load_sweep("widht")


@pytest.fixture
def shakespeare(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be, that is the question.\n" * 100, encoding="utf-8")
    return file


def test_the_runs_are_whole_configs(tmp_path):
    for run in expand(written(tmp_path, SWEEP | {"axes": {"seed": [3]}})):
        assert RunConfig.model_validate(run.to_json()["config"]) == run.config
