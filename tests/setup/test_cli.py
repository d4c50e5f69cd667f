"""The `stepengine` command and its doctor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepengine import doctor

ROOT = Path(__file__).resolve().parents[2]


def _run(
    *arguments: str, code: str | None = None, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "stepengine"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=300,
    )


def _without(*names: str) -> str:
    """Code that runs the command in a Python where these packages cannot be imported."""
    return f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Missing())
from stepengine.cli import main
main()
"""


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from stepengine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'plotly', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = _run(code=code)
    assert done.returncode == 0, done.stderr
    for name in ("doctor", "models", "generate", "ladder", "bench"):
        assert name in done.stdout


def test_importing_the_package_alone_loads_no_torch() -> None:
    code = (
        "import sys, stepengine; assert 'torch' not in sys.modules; stepengine.SamplingParams\n"
        "assert {'LLM', 'SamplingParams', 'RequestOutput'} <= set(dir(stepengine))\n"
        "assert stepengine.SamplingParams.__name__ == 'SamplingParams'"
    )
    done = _run(code=code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import stepengine

    with pytest.raises(AttributeError, match="'Nothing'"):
        _ = stepengine.Nothing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "smolm2-135m", "Hi"], "smollm2-135m"),
        (["generate", "tiny-random", "Hi"], "no tokenizer"),
        (["generate", "tiny-random", "Hi", "--temperature", "-1"], "temperature"),
        (["generate", "tiny-random", "Hi", "--stage", "9"], "9"),
        (["models", "--fetch", "nothing-like-it"], "nothing-like-it"),
    ],
)
def test_bad_input_ends_in_its_sentence_and_status_2(arguments: list[str], said: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stepengine: ")]
    assert said in line


def test_generate_streams_what_it_also_gives_as_json() -> None:
    arguments = ["generate", "smollm2-135m", "The capital of France is", "--max-tokens", "6"]
    streamed, whole = _run(*arguments), _run(*arguments, "--json")
    assert streamed.returncode == 0, streamed.stderr
    answer = json.loads(whole.stdout)
    assert streamed.stdout == answer["text"] + "\n"
    assert answer["finish_reason"] == "length" and len(answer["token_ids"]) == 6


def test_generate_reads_its_prompt_from_stdin() -> None:
    arguments = ["--max-tokens", "3", "--json"]
    piped = _run("generate", "smollm2-135m", "-", *arguments, stdin="Once upon a time")
    given = _run("generate", "smollm2-135m", "Once upon a time", *arguments)
    assert json.loads(piped.stdout)["token_ids"] == json.loads(given.stdout)["token_ids"]


def test_models_lists_the_catalogue(tmp_path: Path) -> None:
    done = _run("models", "--json", STEPENGINE_HOME=str(tmp_path))
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert not any(entry["cached"] for entry in listed.values())
    assert Path(listed["tiny-random"]["folder"]).is_relative_to(tmp_path)
    assert _run("models", "--fetch", "tiny-random", STEPENGINE_HOME=str(tmp_path)).returncode == 0
    again = json.loads(_run("models", "--json", STEPENGINE_HOME=str(tmp_path)).stdout)
    assert [entry["name"] for entry in again if entry["cached"]] == ["tiny-random"]
    table = _run("models").stdout
    assert all(name in table for name in listed)


def test_doctor_says_what_is_here(tmp_path: Path) -> None:
    import torch

    done = _run("doctor", "--json", STEPENGINE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    packages = {package["name"]: package for package in report["packages"]}
    assert packages["torch"]["version"] == torch.__version__ and packages["torch"]["ok"]
    assert packages["torch"]["minimum"] == "2.10" and packages["transformers"]["minimum"] == "5.10"
    assert len(report["torch"]["gpus"]) == torch.cuda.device_count()
    assert report["cache"] == str(tmp_path)
    assert report["cores"] >= 1 and report["runs"]
    text = _run("doctor").stdout
    assert torch.__version__ in text and "What runs how" in text


def test_doctor_works_without_the_optional_packages() -> None:
    done = _run("doctor", code=_without("typer", "rich", "plotly", "gguf", "jupyterlab", "ipywidgets", "anywidget"))
    assert done.returncode == 0, done.stderr
    assert "What runs how" in done.stdout


def test_doctor_works_even_without_torch() -> None:
    code = _without("typer", "torch", "transformers", "numpy")
    done = _run("doctor", "--json", code=code)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["cache"] is None and "torch does not import" in report["runs"][0]
    assert any("torch" in line for line in report["problems"])


def test_the_other_commands_ask_for_what_they_lack() -> None:
    done = _run("models", code=_without("typer"))
    assert done.returncode == 1
    assert "typer" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "minimum", "ok"),
    [
        ("2.9.1", "2.10", False),
        ("2.10", "2.10.0", True),
        ("2.10.0", "2.10", True),
        ("2.13.0+cpu", "2.10", True),
        ("2.10.0rc1", "2.10", True),
        (None, "2.10", False),
        ("3", None, True),
    ],
)
def test_versions_are_compared_as_numbers(version: str | None, minimum: str | None, ok: bool) -> None:
    assert doctor.Package("x", version, minimum, "the engine", required=True).ok is ok


def test_an_optional_package_may_be_missing() -> None:
    assert doctor.Package("x", None, "1.0", "figures", required=False).ok


@pytest.mark.parametrize(
    ("build", "gpus", "expected"),
    [("cpu", [], "STEPENGINE_TORCH=cuda"), ("cuda 13.0", [], "CUDA_VISIBLE_DEVICES"), ("cuda 13.0", [{}], None)],
)
def test_a_gpu_that_torch_cannot_use_is_reported(build: str, gpus: list[dict], expected: str | None) -> None:
    problems = doctor._problems([], doctor.Torch(build, gpus), "NVIDIA A100, 550.1")
    assert bool(problems) is (expected is not None)
    assert expected is None or expected in problems[0]


@pytest.mark.parametrize(("capability", "bf16"), [("7.5", False), ("8.0", True), ("10.0", True)])
def test_dtypes_follow_the_compute_capability(capability: str, bf16: bool) -> None:
    gpu = {"compute_capability": capability}
    lines = doctor._runs(doctor.Torch("cuda 13.0", [gpu]), [])
    assert ("bf16, fp16" in lines[1]) is bf16
