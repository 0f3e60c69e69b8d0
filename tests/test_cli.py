"""Settings from YAML and flags, and bad input as one sentence with exit code 2."""

import csv
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from medsae_ray.cli import main, parse_settings, with_exit_code
from medsae_ray.config import Settings, fingerprinted
from medsae_ray.errors import InputError
from medsae_ray.labels import LABELS
from medsae_ray.pipeline import ASKING, STAGES
from medsae_ray.run import Run

ROOT = Path(__file__).parents[1]


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    config = yaml_file(tmp_path, "run: here\nfit:\n  epochs: 3\n  expansion: 2\n")
    settings = parse_settings("fit", ["--config", config, "--fit.epochs", "5"])
    assert (settings.run, settings.fit.epochs, settings.fit.expansion) == ("here", 5, 2)
    assert settings.fit.sparsity == Settings().fit.sparsity


@pytest.mark.parametrize(
    ("arguments", "text", "sentence"),
    [
        (["--fit.lamda", "1"], "", r"no setting 'fit.lamda'"),
        (["--fit.expansoin", "1"], "", r"no setting 'fit.expansoin' \(did you mean 'fit.expansion'\?\)"),
        ([], "fit: {expansoin: 4}", r"no setting 'fit.expansoin' \(did you mean 'fit.expansion'\?\)"),
        ([], "fti: {epochs: 4}", r"no setting 'fti.epochs' \(did you mean 'fit.epochs'\?\)"),
        (["--fit.sparsity", "-1"], "", r"fit.sparsity is -1.0, but it must be 0 or above"),
        ([], "fit: {sparsity: -0.5}", r"fit.sparsity is -0.5, but it must be 0 or above"),
        (["--fit.epochs", "many"], "", r"fit.epochs"),
        (["--embed.precision", "float16"], "", r"embed.precision"),
        ([], "fit: [1, 2", r"settings.yaml"),
        ([], "fit:", r"settings.yaml does not map stages to settings"),
        (
            ["--medgemma.backend", "vllm"],
            "",
            r"medgemma.backend is 'vllm', but it must be engine, endpoint or",
        ),
        (["--medgemma.engine", '{"trust_remote_code": true}'], "", r"code from a checkpoint is never run"),
        (
            ["--medgemma.replicas_min", "3"],
            "",
            r"medgemma.replicas_min is 3, .* at most medgemma.replicas_max",
        ),
        (["--panels.min_patients", "1"], "", r"panels.min_patients is 1, but it must be at least 2"),
        (["--until", "naming"], "", r"until"),
        (["--ray.cpus", "2"], "", r"ray.cpus is 2, but it must be 0 or at least 4"),
    ],
)
def test_a_bad_setting_is_one_sentence(tmp_path, arguments, text, sentence):
    config = ["--config", yaml_file(tmp_path, text)] if text else []
    with pytest.raises(InputError, match=sentence) as told:
        parse_settings("fit", [*config, *arguments])
    assert "\n" not in str(told.value)


def test_exit_code_two_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "medsae_ray.cli", "fit", "--fit.lamda", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("medsae: There is no setting 'fit.lamda'")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["pipeline", *STAGES])
def test_help_shows_every_setting_of_the_stage(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_settings(command, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    stages = [f.name for f in fields(Settings) if is_dataclass(f.default) and f.name != "ray"]
    for stage in stages:
        shown = f"--{stage}.{fields(getattr(Settings(), stage))[0].name} " in text
        asks = stage == "medgemma" and command in ASKING
        assert shown == (command in (stage, "pipeline") or asks)
    assert ("--dry_run" in text) == (command in ("pipeline", *ASKING))
    if command == "fit":
        assert "the weight of the sparsity term of relu, gated and jumprelu (paper: 3e-4)" in text
        assert "default: 0.0003" in text


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_settings("pipeline", ["--help"])
    text = capsys.readouterr().out
    for f in fields(Settings):
        if is_dataclass(f.default):
            for inner in fields(f.default):
                after = text.split(f"--{f.name}.{inner.name} ", 1)[1].split("(type:")[0]
                assert len(after.split()) > 5, f"{f.name}.{inner.name} has no help"


def test_paper_yaml_holds_the_papers_settings():
    fit = parse_settings("fit", ["--config", str(ROOT / "jobs" / "paper.yaml")]).fit
    assert (fit.expansion, fit.sparsity, fit.learning_rate, fit.epochs) == (16, 3e-4, 7e-6, 200)
    assert (fit.batch_size, fit.normalisation, fit.reconstruction, fit.fve_floor) == (
        1024,
        "unit",
        "sum",
        0.95,
    )


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "jobs").glob("*.yaml")))
def test_every_shipped_config_parses(config):
    assert isinstance(parse_settings("pipeline", ["--config", str(ROOT / "jobs" / config)]), Settings)


def test_resources_are_not_fingerprinted():
    settings = Settings()
    assert "workers" not in fingerprinted(settings.fit)
    assert "weights" not in fingerprinted(settings.embed)
    assert fingerprinted(settings.fit)["sparsity"] == 3e-4


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("medsae: ")
    assert sentence.count("\n") == 1
    return sentence


def chexpert_csv(folder: Path, columns: list[str], rows: list[list[str]]) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "train.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return folder


HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]


def test_a_missing_column_is_named(tmp_path, capsys):
    root = chexpert_csv(tmp_path / "CheXpert-v1.0-small", [c for c in HEADER if c != "Edema"], [["x"] * 18])
    told = refusal(
        capsys, "radiographs", "--run", str(tmp_path / "run"), "--radiographs.dataset", "chexpert",
        "--radiographs.root", str(root),
    )  # fmt: skip
    assert "Edema" in told
    assert "train.csv" in told


def test_an_empty_table_is_told(tmp_path, capsys):
    root = chexpert_csv(tmp_path / "CheXpert-v1.0-small", HEADER, [])
    told = refusal(
        capsys, "radiographs", "--run", str(tmp_path / "run"), "--radiographs.dataset", "chexpert",
        "--radiographs.root", str(root),
    )  # fmt: skip
    assert "train.csv" in told


def test_commands_and_stages_out_of_order(tmp_path, capsys):
    assert "did you mean 'measure'" in refusal(capsys, "mesure")
    assert "run `medsae radiographs`" in refusal(
        capsys, "embed", "--run", str(tmp_path), "--embed.encoder", "stand-in"
    )
    assert "holds no run" in refusal(capsys, "status", str(tmp_path))
    assert "radiographs.root is missing" in refusal(
        capsys, "radiographs", "--run", str(tmp_path), "--radiographs.dataset", "nih"
    )


def test_a_pipeline_asks_for_its_model_before_anything_else(tmp_path, capsys):
    told = refusal(
        capsys, "pipeline", "--run", str(tmp_path / "run"), "--medgemma.model", str(tmp_path / "no")
    )
    assert "does not exist" in told
    assert "--until localise" in told
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_of_the_asking_stages_alone(tmp_path, capsys):
    assert "Only name and detect know --dry-run" in refusal(
        capsys, "fit", "--dry-run", "--run", str(tmp_path)
    )
    told = refusal(capsys, "name", "--dry-run", "--run", str(tmp_path))
    assert "run `medsae panels`" in told


def test_a_backend_of_ones_own_is_named_by_import_path(tmp_path):
    from medsae_ray.config import MedgemmaSettings
    from medsae_ray.medgemma.pool import answer, identify
    from medsae_ray.medgemma.prompts import Task, load_template

    task = Task("detect", load_template("detect", None), 1, 1)
    settings = MedgemmaSettings(backend="operator:methodcaller", model="mine")
    assert answer("requests", task, settings)  # it was found and called
    assert identify(settings, 1).name == "mine"
    with pytest.raises(InputError, match=r"'operator:nothing' cannot be imported"):
        answer("requests", task, MedgemmaSettings(backend="operator:nothing"))


def test_overwrite_needs_no_value():
    assert parse_settings("fit", ["--overwrite"]).overwrite
    assert parse_settings("fit", ["--overwrite", "--fit.epochs", "3"]).overwrite
    assert not parse_settings("fit", ["--overwrite", "false"]).overwrite
    assert not parse_settings("fit", []).overwrite


def test_an_error_of_a_worker_is_told_as_its_sentence(capsys):
    def work():
        try:
            raise InputError("This is wrong.")
        except InputError as error:
            raise RuntimeError("a worker failed") from error

    with pytest.raises(SystemExit) as ended:
        with_exit_code(work)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "medsae: This is wrong.\n"
    with pytest.raises(ZeroDivisionError):
        with_exit_code(lambda: 1 / 0)


def test_limit_keeps_the_first_ids_of_the_split_table(tmp_path, capsys):
    rows = [f"{i}.png,p{i},{i % 2}" for i in range(200)]
    (tmp_path / "radiographs.csv").write_text("\n".join(["path,patient_id,Edema", *rows, ",p7,1"]) + "\n")
    flags = ("--radiographs.dataset", "folder", "--radiographs.root", str(tmp_path))
    for run, limit in (("whole", []), ("few", ["--radiographs.limit", "50"])):
        main(["radiographs", "--run", str(tmp_path / run), *flags, *limit])
    whole, few = (Run(str(tmp_path / run)).read("radiographs") for run in ("whole", "few"))
    assert whole.num_rows == 200
    assert few.equals(whole.slice(0, 50))
    assert Run(str(tmp_path / "few")).manifest("radiographs").quarantined == 1


def test_an_unusable_run_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    told = refusal(capsys, "radiographs", "--run", str(tmp_path / "file" / "run"))
    assert "cannot be used" in told


@pytest.mark.parametrize("key", ["run", "radiographs.root", "embed.weights"])
def test_a_relative_path_is_refused_in_a_submitted_job(key, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    arguments = {"run": str(tmp_path), key: "runs/demo"}
    flags = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    told = refusal(capsys, "pipeline", *flags)
    assert f"Setting {key} is the relative path 'runs/demo'" in told
    assert "absolute path" in told


def test_importing_the_package_starts_and_loads_nothing_heavy():
    heavy = "{'ray', 'torch', 'transformers', 'vllm'}"
    code = f"import sys, medsae_ray.cli; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
