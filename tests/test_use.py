"""The files in use elsewhere: copied alone, imported, called from Python; the examples of README.md."""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import models
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

USES = {
    "models": "import torch, models\n"
              "logits, rebuilt = models.build('v2')(torch.zeros(2, 3, 32, 32))\n"
              "print(*logits.shape, *rebuilt.shape)",
    "losses": "import torch, losses\n"
              "total, terms = losses.weighted_loss({'alpha': 2, 'beta': 0}, logits=torch.zeros(4, 8),\n"
              "                                    labels=torch.tensor([0, 1, 2, 3]))\n"
              "print(f'{total.item():.4f}', *terms)",
    "data": "import data\n"
            "dataset = data.shapes(train=40, test=20)\n"
            "images, labels = next(data.batches(dataset.train, 8, epoch_seed=0, flip=True))\n"
            "print(dataset.name, *images.shape, *labels.shape)",
}
PRINTS = {"models": "2 10 2 3 32 32", "losses": "4.1589 classifier", "data": "shapes 8 3 32 32 8"}


@pytest.mark.parametrize("name", USES)
def test_a_file_copied_alone_works(name, tmp_path, python):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = python("-c", USES[name], folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == PRINTS[name]  # 4.1589 = 2 * ln 8


def test_the_readmes_python_runs(tmp_path, python):
    """All its examples as one program, on fewer images."""
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "\n".join(examples).replace("epochs=6", "epochs=1, train_size=40, test_size=20")
    code = code.replace('load("shapes")', 'load("shapes", train_size=64, test_size=100)')
    assert code.count("train_size=40") == 1 and code.count("train_size=64") == 2
    done = python("-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout and done.stdout.splitlines()[-1].startswith("(100, ")


def flags_of(command):
    """The words of a README command after its program's name, and the program."""
    words = re.sub(r"\s+#.*", "", command).split("python ", 1)[1]
    program, _, flags = words.partition(".py")
    return program, shlex.split(flags)


def test_the_readmes_commands_have_flags_that_exist():
    """Every `python train.py ...` in it is parsed; what they do is tested elsewhere."""
    commands = re.findall(r"python train\.py [^`\n|]*", README)
    assert len(commands) >= 7
    for command in commands:
        _, flags = flags_of(command)
        many, words = train.MANY.parse_known_args([word for word in flags if word not in ("-h", "...")])
        train.parse(["v4" if word == "NAME" else word for word in words])


def test_the_two_commands_of_the_readme_are_as_ci_runs_them():
    assert (ROOT / ".ci/run").read_text().count("grep -m1 'python -m pytest' README.md") == 1
    assert re.search(r"^.*-m venv .*requirements.txt.*python -m pytest -q tests$", README, re.MULTILINE)


STATE = """
import os, random, signal, socket, sys, threading, warnings
import numpy, torch

def state():
    return dict(
        deterministic=torch.are_deterministic_algorithms_enabled(), dtype=torch.get_default_dtype(),
        threads=(torch.get_num_threads(), threading.active_count()), device=torch.get_default_device(),
        grad=torch.is_grad_enabled(), cuda=torch.cuda.is_initialized(), benchmark=torch.backends.cudnn.benchmark,
        tf32=(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        torch_seed=torch.random.get_rng_state().tolist(), seed=random.getstate(),
        numpy_seed=numpy.random.get_state()[1].tolist(), environment=dict(os.environ),
        signals=[signal.getsignal(each) for each in sorted(signal.valid_signals())], hook=sys.excepthook,
        filters=list(warnings.filters), timeout=socket.getdefaulttimeout(), folder=os.getcwd(),
        streams=(sys.stdout, sys.stderr), heavy={"torchvision", "matplotlib", "PIL"} & set(sys.modules))

before = state()
for name in ("losses", "models", "data", "evaluate", "train"):
    module = __import__(name)
    changed = {key: (before[key], value) for key, value in state().items() if value != before[key]}
    print(name, changed or "nothing")
"""


def test_an_import_changes_nothing_global_and_is_light(tmp_path, python):
    done = python("-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{STATE}", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{name} nothing"
                                        for name in ("losses", "models", "data", "evaluate", "train")]
    assert list(tmp_path.iterdir()) == []


def test_run_trains_as_the_command_does(tiny, tmp_path, undrawn):
    model, rows, folder = result = train.run(
        version="v3", dataset=Path(tiny), epochs=1, classes=["ring", "star"], flip=False, lr=0.003, device="cpu",
        output=tmp_path / "python", variant="constrained", constrain={"ring": 0.5})
    assert result._fields == ("model", "rows", "folder") and isinstance(model, models.Autoencoder)
    assert not model.training and folder.parent == tmp_path / "python" and rows[0]["lr"] == 0.003
    assert train.main(["--version", "v3", "--dataset", tiny, "--classes", "ring,star", "--epochs", "1", "--no-flip",
                       "--lr", "0.003", "--device", "cpu", "--variant", "constrained", "--constrain", "ring=0.5",
                       "--output", str(tmp_path / "command")]) == 0
    other, _ = models.load(tmp_path / "command" / folder.name / "last.pt")
    for (name, weight), value in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(weight, value), name
    settings = [json.loads((each / "config.json").read_text())["settings"] for each in (
        folder, tmp_path / "command" / folder.name)]
    assert {**settings[0], "output": ""} == {**settings[1], "output": ""}
    alone = train.run(version="v3", dataset=tiny, epochs=1, decoder=None, skip=False, output=tmp_path, device="cpu")
    assert alone.model.decoder is None and alone.folder.name == "v3_dataset-tiny_epochs1_no-decoder"
    longer = train.run(resume=folder, epochs=2)
    assert len(longer.rows) == 2 and longer.rows[0] == rows[0]


@pytest.mark.parametrize("settings, message", [
    (dict(epoch=1), "epoch"), (dict(epochs=0), "'0': expected a whole number of at least 1"),
    (dict(lr="fast"), "'fast': expected a number"), (dict(version="v44"), "did you mean 'v4'"),
    (dict(dataset="nowhere"), "no data set 'nowhere'"), (dict(seeds=2), "one run"), (dict(sweep="kind"), "one run")],
    ids=str)
def test_run_raises_a_value_error_where_the_command_would_end(settings, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        train.run(**{"dataset": tiny, "version": "v3", "epochs": 1} | settings)
    assert list(tmp_path.iterdir()) == []
