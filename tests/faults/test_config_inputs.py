"""What a user says: every key of a config with odd values, YAML and JSON that attack, options, names, sizes.

Each is taken, or refused with an InputError in a readable line, at once. Nothing here trains.
"""

import contextlib
import io
import json
import os
import random
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import BaseModel

import cli
from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.estimate import Workload, fit, site_of
from mlx_moe.accounting.machines import choose_machine
from mlx_moe.config import RunConfig, save
from mlx_moe.errors import InputError
from mlx_moe.phases import phase_model, trained_model
from mlx_moe.presets import as_overrides, load_architecture, load_run
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.reading import parse_json, parse_yaml, read_mapping
from mlx_moe.training.run_plan import make_plan, with_its_vocabulary
from mlx_moe.validation import validate

SECONDS = 2  # of this process
LONGEST_LINE = 700  # characters: an unknown key of the model names all there are


@pytest.fixture
def quick():
    """What is done in the test takes this process less than SECONDS."""
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def answer(*argv):
    """The exit code of `mlxmoe ARGV` in this process, and its standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["mlxmoe", *map(str, argv)])
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0), err.getvalue()


def check_refused(error):
    for line in str(error).splitlines():
        assert len(line) <= LONGEST_LINE, line
    assert len(str(error).splitlines()) <= 6


def keys(kind, prefix=""):
    for name, field in kind.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{prefix}{name}.")


def parsed(text):
    with contextlib.suppress(InputError):
        yield parse_yaml(text, "value")


# fmt: off
SHORT = [
    "", "null", "true", "false", "yes", "0", "-1", "1", "2", "3", "7", "64", "4096", "16384", "1048576", "16777216",
    "1000000000", "1000000000000", "9" * 300, "1e30", "1.0e+30", "1.1e+30", "1e-320", "1e-30", "1e-45", ".nan", ".inf",
    "-.inf", "NaN", "'inf'", "0.5", "0.9999999999999999", "1.5", "[]", "{}", "[1]", "[[1]]", "[1, 3]", "[2, 3]",
    "{a: 1}", "{1: 2}", "{null: 3}", "{true: 1}", "{'': 1}", "x", "'~nosuch/x'", "' a'", "../../x", "/abs", "-x", ".x",
    '"a\\0b"', '"a\\e[31mb"', '"a\\nb"', "2024-13-01", "1:30", "1_000", "0x10", "017", "+5", "=", "bpe:0", "char",
    "[q_proj]", "[gate_proj]", '"\\ud83d\\ude00"', "{n_experts: 16384, top_k: 16384}", "{n_experts: 2, layers: [true]}",
]
# fmt: on
LONG = [
    "9" * 5000,
    f"'{'n' * 300}'",
    f"'{'n' * 50_000}'",
    "{a: " * 40 + "1" + "}" * 40,
    f"[{'1, ' * 3000}]",
    "{" + ", ".join(f"k{i}: 1" for i in range(3000)) + "}",
]
VALUES = [value for text in [*SHORT, *LONG] for value in parsed(text)]


@pytest.mark.parametrize("key", list(keys(RunConfig)))
def test_every_key_takes_or_refuses_every_value(key):
    """Some 8,500 in all; what is taken can be counted, and planned for."""
    for value in VALUES:
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        began = time.process_time()
        try:
            count_all(validate(RunConfig, nested))
        except InputError as error:
            check_refused(error)
        assert time.process_time() - began < SECONDS, (key, value)


def count_all(run):
    run = with_its_vocabulary(run)
    for phase in range(run.first_phase, 4):
        json.dumps(count_parameters(phase_model(run, phase)).to_json())
        work = Workload("phase", trained_model(run, phase), run.optimizer, run.engine, run.training.batch_size, 10)
        json.dumps(fit(work, site_of(*choose_machine("M1"), run.engine)).to_json())


EXTREMES = {
    "model.n_layers": [1, 4096],
    "model.d_model": [2, 1 << 16, 1 << 20],
    "model.n_heads": [1, 1 << 16],
    "model.head_dim": [2, 1 << 16],
    "model.d_ff": [1, 1 << 24],
    "model.vocab_size": [2, 1 << 24],
    "model.context_length": [2, 1 << 24],
    "model.ffn_type": ["swiglu"],
    "model.position_encoding": ["none", "learned_absolute"],
    "model.rope_theta": [1e-30, 1e30],
    "model.norm_eps": [1e-30, 1e30],
    "model.moe": [{"n_experts": 1 << 14, "top_k": 1 << 14}, {"n_experts": 4, "layers": [*range(0, 4096, 3)]}],
    "training.batch_size": [720_720, 1 << 20],
    "engine.accumulation_steps": [720_720, 1 << 20],
    "engine.precision": ["bf16"],
    "optimizer.name": ["muon"],
    "phases.dense.steps": [1, 10**10],
    "phases.moe.n_experts": [1, 1 << 14],
    "phases.moe.top_k": [1, 1 << 14],
    "phases.moe.granularity": [2, 1 << 14],
    "phases.moe.every": [2, 4096],
    "phases.large_moe.d_model": [1 << 20],
    "phases.large_moe.n_layers": [4096],
    "phases.large_moe.n_heads": [1 << 16],
    "phases.large_moe.d_ff": [1 << 24],
}


@pytest.mark.parametrize("seed", range(100))
def test_legal_extremes_together_are_planned_for_or_refused(seed, quick):
    draw = random.Random(seed)
    chosen = {key: draw.choice(EXTREMES[key]) for key in draw.sample(list(EXTREMES), draw.randint(1, 6))}
    try:
        json.dumps(make_plan(load_run("demo", None, as_overrides(chosen)), machine="M1").to_json())
    except InputError as error:
        check_refused(error)


def test_the_deepest_model_is_counted_at_once(quick):
    deep = {"model.n_layers": 4096, "model.d_model": 64, "model.moe": {"n_experts": 4, "layers": [*range(1, 4096, 2)]}}
    run = load_run("demo", None, as_overrides({**deep, "training.batch_size": 720_720}))
    assert count_parameters(run.model).idle_experts == 2 * 2048
    dense = load_run("three-phase", None, ["model.n_layers=4096", "model.d_model=64", "phases.moe.every=2"])
    assert [work.model.n_layers for work in make_plan(dense, machine="M1").works] == [4096] * 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.n_layers=1000000000", "model.n_layers = 1000000000: must be at most 4096"),
        ("model.d_model=99999999999", "model.d_model = 99999999999: must be at most 1048576"),
        ("training.batch_size=1000000000000", "training.batch_size = 1000000000000: must be at most 1048576"),
        ("phases.dense.steps=1e30", "phases.dense.steps = '1e30': input should be a valid integer"),
        ("phases.dense.steps=1.0e+30", "phases.dense.steps = 1e+30:"),
        ("model.d_model=99999", "d_model 99999 is not divisible by n_heads 8; take n_heads 9,"),
        (
            "model={d_model: 65536, n_layers: 4096}",
            "211,109,526,175,744 parameters; must be at most 10,000,000,000,000",
        ),
        ("phases.moe={n_experts: 16384, granularity: 2}", "must be at most 16384 experts in all"),
        ("data.tokenizer=bpe:99999999999", "a number from 257"),
        ("training.batch_size=true", "training.batch_size = True: must be a number, not true or false"),
        ("optimizer.betas=[0.9, 0.99999999999]", "optimizer.betas.1 = 0.99999999999: is 1 in float32"),
        ("optimizer.eps=1e-320", "must be greater than or equal to 1e-30"),
        ("phases.dense.learning_rate=1e300", "must be at most 1e+30"),
        ("model.moe={n_experts: 4, layers: [true]}", "model.moe.layers.0 = True: must be a number"),
        ("start={model: x, phases: []}", "start.phases = []: must be one or more numbers"),
        ("start={model: x, phases: [1, 3]}", "start.phases = [1, 3]: must be one or more numbers"),
        ("start={model: x, phases: [4]}", "start.phases: there is no phase 4"),
        ("model.moe.n_experts=1000000000", "model.moe.n_experts = 1000000000: must be at most 16384"),
    ],
)
@pytest.mark.parametrize("command", ["params", "plan"])
def test_what_is_too_large_is_refused_with_its_limit(command, override, said):
    code, err = answer(command, "-o", override)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_experts_that_make_a_model_too_large_are_refused_before_they_are_made():
    run = load_run("demo", None, ["model.d_model=8192", "model.d_ff=1048576", "phases.moe.n_experts=16384"])
    with pytest.raises(InputError, match=r"16384 experts in 4 layers make [0-9,]+ parameters; must be at most"):
        phase_model(run, 2)


def test_adapters_that_the_model_has_no_place_for():
    start = {"model": "x", "phases": [1]}
    with pytest.raises(InputError, match="nothing would be trained"):
        validate(RunConfig, {"start": start, "lora": {"rank": 4, "targets": ["gate_proj"]}})
    assert validate(RunConfig, {"start": start, "lora": {"rank": 4, "targets": ["q_proj"]}}).lora.rank == 4


GOOD_NAMES = ["demo", "ü", "日本語", "😀", "d_model=64,adamw", "my run (2)", "a.b-c_d", "n" * 200, "x'y", 'x"y', "a=b"]
BAD_NAMES = ["", " ", " a", "a ", ".", "..", ".x", "-x", "../../x", "/abs", "a/b", "a\\b", "n" * 201, "ü" * 101]
BAD_NAMES += ["a\0b", "a\nb", "a\x1b[31mb", "a\x7fb", "\u202ea", "a\u2028b", "\ud83d"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names_that_a_folder_may_have(name, tmp_path):
    run = load_run("demo", None, as_overrides({"name": name}))
    assert run.name == name
    save(run, tmp_path / "config.yaml")
    assert validate(RunConfig, read_mapping(tmp_path / "config.yaml")) == run


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_lead_elsewhere_or_show_as_another(name):
    with pytest.raises(InputError, match="name"):
        load_run("demo", None, as_overrides({"name": name}))
    with pytest.raises(InputError):
        validate(RunConfig, {"name": name})


@pytest.mark.parametrize(
    "name", ["1e-3", "1_000", "0x10", "017", "1:30", "no", "on", "null", "~", "2024-01-01", "=", "<<", "true", ".5"]
)
def test_a_text_that_looks_like_something_else_is_read_back(name, tmp_path):
    run = load_run("demo").model_copy(update={"name": "x"})
    data = run.data.model_copy(update={"text_field": name})
    save(run.model_copy(update={"data": data}), tmp_path / "config.yaml")
    assert read_mapping(tmp_path / "config.yaml")["data"]["text_field"] == name


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(['*' + old] * 10)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED_YAML = {
    "bomb": BOMB,
    "bomb in a field": BOMB.replace("i: &i", "model: &i"),
    "bomb of merges": MERGES,
    "chain": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500)),
    "inside itself": "a: &x [*x]",
    "a mapping inside itself": "a: &x {b: *x}",
    "deep": "[" * 1000,
    "deep and whole": "[" * 100 + "]" * 100,
    "deep blocks": "- " * 400,
    "long": "x: [" + "1, " * 100_000 + "]",
    "digits": "a: " + "9" * 5000,
    "many digits": "a: " + "9" * 400,
    "version": "%YAML 1." + "9" * 5000 + "\n---\na: 1",
    "character": '"\\UFFFFFFFF"',
    "surrogate": '"\\ud83d"',
    "NUL": "a: \0",
    "escape": "a: \x1b[31m",
    "twice": "a: 1\na: 2",
    "twice, quoted": 'a: 1\n"a": 2',
    "twice in a merged one": "m: {<<: {a: 1, a: 2}}",
    "twice by alias": "? &k a\n: 1\n? *k\n: 2",
    "list as key": "? [a]\n: 1",
    "mapping as key": "? {a: 1}\n: 1",
    "alias of a list as key": "x: &x [1]\n? *x\n: 1",
    "two documents": "---\na: 1\n---\nb: 1",
    "merge of a number": "<<: 3",
    "unknown alias": "*x",
    **{tag: f"a: !!{tag}" for tag in ("timestamp x", 'int ""', "int x", "int 1:30", "int [1]", "float abc", "float 3")},
    **{tag: f"a: !!{tag}" for tag in ("bool maybe", "null x", "binary x", "set {a}", "omap [a: 1]", "pairs [a: 1]")},
    **{tag: f"a: !!{tag}" for tag in ("map x", "map [1, 2]", "seq x", "seq {a: 1}", "str [1]", "merge x", "value x")},
    **{tag: f"a: !!{tag}" for tag in ("python/name:os.system", "python/object/apply:os.getcwd []", "x y")},
}


@pytest.mark.parametrize("name", REFUSED_YAML)
def test_yaml_that_is_refused(name, quick):
    with pytest.raises(InputError) as caught:
        parse_yaml(REFUSED_YAML[name], "run.yaml")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run.yaml ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("-0", 0), ("+5", 5), ("017", "017"), ("0x10", "0x10"), ("1_000", "1_000"), ("1:30", "1:30"), ("1e3", "1e3")],
        *[("1.5e+3", 1500.0), (".5", 0.5), ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("True", True), ("~", None)],
        *[("2024-01-01", "2024-01-01"), ("=", "="), ("!!int 9", 9), ("!!float 1.5", 1.5), ("!!str 3", "3")],
        *[('"\\ud83d\\ude00"', "😀"), ("\ufeff{a: 1}", {"a": 1}), ("{<<: {a: 1}, a: 2}", {"a": 2}), ("", None)],
        ("{b: &b {x: 1}, m: {<<: &d {<<: *b, x: 2}}, n: *d}", {"b": {"x": 1}, "m": {"x": 2}, "n": {"x": 2}}),
    ],
)
def test_yaml_without_surprises(text, value):
    assert parse_yaml(text, "value") == value
    assert type(parse_yaml(text, "value")) is type(value)


REFUSED_JSON = ['{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 400 + "}", '{"\\ud83d": 1}', "[1,]"]
REFUSED_JSON += ["", "{} x", "[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900]


@pytest.mark.parametrize("text", REFUSED_JSON, ids=range(len(REFUSED_JSON)))
def test_json_that_is_refused(text, quick):
    with pytest.raises(InputError) as caught:
        parse_json(text, "config.json")
    assert len(str(caught.value)) < 400
    assert "set_int_max_str_digits" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        *[({1: 2}, "1: keys should be strings"), ({None: 2}, "this is None"), ({True: 2}, "this is True")],
        ({"model": {1: 2}}, "model.1"),
        ({"phases": {"moe": {None: 2}}}, "phases.moe.None"),
        ({"phases": {"moe": {"transfer": "upcycle", "n_expert": 2}}}, "did you mean 'n_experts'"),
        ({"model": {"moe": {"n_expert": 2}}}, "did you mean 'n_experts'"),
        ({"model": {"rope_scaling": {"factr": 2}}}, "did you mean 'factor'"),
        ({"start": {"model": "x", "phases": [1], "lineag": []}}, "did you mean 'lineage'"),
        ({"optimizer": {"betas": [{"x": 1}, 0.9]}}, "optimizer.betas.0"),
        ({"optimizer": {"betas": {"x": 1}}}, "optimizer.betas"),
        ({"lora": {"targets": [{"x": 1}]}}, "lora.targets.0"),
        ({"k" * 100_000: 1}, "unknown key 'kkk"),
        ({"name": ["x" * 100_000]}, "name = ['xxx"),
        ({"seed": {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}}, "seed = {'a'"),
        ({f"k{i}": 1 for i in range(1000)}, "and 995 more"),
    ],
)
def test_what_is_wrong_is_named_and_cut(written, said):
    with pytest.raises(InputError) as caught:
        validate(RunConfig, written)
    check_refused(caught.value)
    assert said in str(caught.value)


def test_data_that_is_no_section_is_not_overwritten_by_the_vocabulary():
    with pytest.raises(InputError, match="data = 7"):
        load_run("demo", None, ["data=7", "model.vocab_size=3000"])


def test_a_path_beyond_the_first_characters_comes_through():
    assert load_run("demo", None, as_overrides({"data.source": "😀/ü \x7f'\".txt"})).data.source == "😀/ü \x7f'\".txt"


ODD_OVERRIDES = [
    *["x", "=x", ".", "=", "a" * 100_000, f"{'a.' * 10_000}=1", "name=\udcff", "x\udcff=1", f"name={'n' * 100_000}"],
    *["model=1", "model.d_model={}", "phases.moe=[1]", "model.architecture=[1]", "model.architecture={a: 1}", "a..b=1"],
    *["model.architecture=../runs/demo", "name=", "name=\x1b[31m", f"model.d_model={'[' * 1000}"],
    *["model.d_model=2024-13-01", "model.d_model=!!timestamp x"],
]


@pytest.mark.parametrize("option", ODD_OVERRIDES, ids=range(len(ODD_OVERRIDES)))
def test_an_odd_override_is_one_line(option):
    code, err = answer("params", "-o", option)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert len(err) < LONGEST_LINE
    assert err.startswith("error: ")
    assert "\x1b" not in err


@pytest.fixture
def odd_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "utf16.yaml").write_bytes("seed: 3\n".encode("utf-16"))
    (tmp_path / "nul.yaml").write_bytes(b"seed: 3\n\0")
    (tmp_path / "double.json").write_text('{"seed": 1, "seed": 2}')
    (tmp_path / "many.yaml").write_text("\n".join(f"k{i}: 1" for i in range(3000)))
    with (tmp_path / "huge.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    return tmp_path


ODD_FILES = ["fifo.yaml", "loop.yaml", "utf16.yaml", "nul.yaml", "double.json", "huge.yaml", "", "none.yaml", "a\nb"]
ODD_FILES += ["n" * 300, "n/" * 3000, "/dev/zero", "/dev/null", "~nosuchuser/x"]


@pytest.mark.parametrize("name", ODD_FILES, ids=range(len(ODD_FILES)))
def test_an_odd_file_is_one_line(name, odd_files, quick):
    file = name if name.startswith(("/", "~")) else odd_files / name
    code, err = answer("params", "-c", file)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert len(err) < LONGEST_LINE


def test_a_file_of_nonsense_names_a_few_of_its_faults(odd_files, quick):
    code, err = answer("params", "-c", odd_files / "many.yaml")
    assert code == 2
    assert len(err.splitlines()) == 6


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_byte_order_mark_is_no_fault(ending, tmp_path):
    (tmp_path / f"run.{ending}").write_text('{"seed": 3}', encoding="utf-8-sig")
    assert load_run("demo", tmp_path / f"run.{ending}").seed == 3


@pytest.mark.parametrize("path", ["~nosuchuser/x", "n" * 300, "n/" * 3000, "a\0b"])
def test_paths_that_no_file_can_have(path):
    with pytest.raises(InputError) as caught:
        absolute(Path(path))
    assert len(str(caught.value)) < 200


BOUNDED_BY_THE_CONFIG = {("train", "steps"), ("train", "seed"), ("upcycle", "noise"), ("upcycle", "drop")}


def numbers():
    for command in [*cli.app.registered_commands, *cli.data.registered_commands]:
        name = command.name or command.callback.__name__
        for option, hint in get_type_hints(command.callback, include_extras=True).items():
            parts = {hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))}
            if {int, float} & {part for part in parts if isinstance(part, type)}:
                yield pytest.param(name, option, hint, id=f"{name} {option}")


@pytest.mark.parametrize(("command", "option", "hint"), list(numbers()))
def test_every_number_of_every_command_has_limits(command, option, hint):
    if (command, option) in BOUNDED_BY_THE_CONFIG:
        return
    (declared,) = [part for part in get_args(hint) if hasattr(part, "param_decls")]
    assert (declared.min is not None and declared.max is not None) or declared.callback


ODD_OPTIONS = [
    *(f"{command} --seed -1" for command in ("generate x", "fit x", "parity", "train", "upcycle x y", "grow x y")),
    *(f"generate x --temperature {value}" for value in ("1e-320", "nan", "inf", "-1", "1e300")),
    *(f"generate x --top-p {value}" for value in ("0", "nan", "-1", "1.1")),
    *(f"generate x --min-p {value}" for value in ("nan", "-1", "1.1")),
    *(f"generate x --repetition-penalty {value}" for value in ("0", "nan", "-1", "inf")),
    *(f"upcycle x y --noise {value}" for value in ("nan", "inf", "-1", "1e300")),
    *(f"upcycle x y --{name} 1000000000" for name in ("experts", "top-k", "granularity", "every")),
    *(f"grow x y --{name} 1000000000" for name in ("d-model", "n-layers", "n-heads", "d-ff")),
    *(f"{command} -n 1000000000" for command in ("generate x", "eval x")),
    "generate x --seed 9223372036854775808",
    "generate x --top-k 1000000000",
    "upcycle x y --drop nan",
    "upcycle x y --experts 16384 --granularity 2",
    "fit x --level nan",
    "fit x --resamples 1000000000",
    "sweep x --jobs 1000000000",
    "experts x --sequences 1000000000",
    "compare --latest 1000000000",
    "eval x --max-bytes 1000000000000000",
    f"train --steps {'9' * 5000}",
    f"plan --machine {'9' * 5000}GB",
    f"plan --machine {'x' * 9999}",
    "params --nonsense",
    "nonsense",
    "generate",
    f"params {'x' * 9999}",
    "params --json=3",
    "train -o",
]


@pytest.mark.parametrize("arguments", ODD_OPTIONS, ids=lambda text: text[:60])
def test_an_odd_option_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = answer(*arguments.split())
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert len(err) < LONGEST_LINE
    assert not any(tmp_path.iterdir())


def test_help_without_a_command_is_help():
    code, err = answer()
    assert code == 2
    assert "Commands:" in err


def test_a_vocabulary_that_is_not_known_is_said(tmp_path):
    code, err = answer("params", "--preset", "shakespeare-char-cpu", "--json")
    assert code == 0
    assert "the vocabulary of tokenizer char is not known before the data is read; 50,257 tokens assumed" in err
    plan = make_plan(load_run("shakespeare-char-cpu"), machine="M1")
    assert "50,257 tokens assumed" in plan.to_json()["warnings"][0]
    assert not make_plan(load_run("shakespeare-char-cpu", None, ["model.vocab_size=67"]), machine="M1").to_json()[
        "warnings"
    ]


def test_the_vocabulary_of_a_tokenizer_folder_is_counted(tmp_path):
    from mlx_moe.data.tokenizers import make_tokenizer

    make_tokenizer("char", lambda: iter(["abcdef"])).save(tmp_path)
    run = with_its_vocabulary(load_run("demo", None, as_overrides({"data.tokenizer": str(tmp_path)})))
    assert run.model.vocab_size == 8
    (tmp_path / "tokenizer.json").write_text("{")
    code, err = answer("params", "-o", f"data.tokenizer={tmp_path}")
    assert code == 2
    assert "tokenizer.json" in err


def test_gpt2_has_its_own_vocabulary_whatever_the_architecture_had():
    assert with_its_vocabulary(load_run("smollm")).model.vocab_size == 50257
    assert load_architecture("smollm").vocab_size == 49152
