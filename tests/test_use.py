"""The files in use elsewhere: copied alone, imported, called from Python, their output closed."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import models
import train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """An empty folder, beside which `python` keeps the output."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


# ---------------------------------------------------------------- copied, imported

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
def test_a_file_copied_alone_works(name, folder, python):
    shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "use.py").write_text(USES[name])
    done = python(folder / "use.py", folder=folder)
    assert (done.status, done.err) == (0, "")
    assert done.out.strip() == PRINTS[name]  # 4.1589 = 2 * ln 8


def test_the_readmes_python_runs(folder, python):
    """Its first four examples, the last of them on fewer images."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 5 and "train_size=1000, epochs=6" in examples[3]
    examples[3] = examples[3].replace("train_size=1000, epochs=6", "train_size=20, test_size=10, epochs=1")
    (folder / "use.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + "".join(examples[:4]))
    done = python(folder / "use.py", folder=folder)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "torch.Size([8, 10]) torch.Size([8, 1, 28, 28]) torch.Size([8, 32, 14, 14])"
    assert lines[1].endswith("torch.Size([32, 3, 32, 32]) torch.Size([32])")
    assert lines[2].startswith("2.3025") and lines[2].endswith("['classifier', 'autoencoder']")  # ln 10
    assert lines[-1].startswith("(100, 32, 16, 16) ['circle', 'ring'")


STATE = f"""
import gc, os, random, signal, socket, sys, threading, warnings
import matplotlib, numpy, torch

def state():
    return dict(
        backend=str(dict.__getitem__(matplotlib.rcParams, "backend")), pyplot="matplotlib.pyplot" in sys.modules,
        deterministic=torch.are_deterministic_algorithms_enabled(), dtype=torch.get_default_dtype(),
        threads=(torch.get_num_threads(), threading.active_count()), device=torch.get_default_device(),
        grad=torch.is_grad_enabled(), cuda=torch.cuda.is_initialized(), benchmark=torch.backends.cudnn.benchmark,
        tf32=(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        torch_seed=torch.random.get_rng_state().tolist(), seed=random.getstate(),
        numpy_seed=numpy.random.get_state()[1].tolist(), numpy_print=numpy.get_printoptions(),
        signals=[signal.getsignal(each) for each in sorted(signal.valid_signals())], environment=dict(os.environ),
        filters=list(warnings.filters), hook=sys.excepthook, timeout=socket.getdefaulttimeout(),
        collector=gc.isenabled(), folder=os.getcwd(), argv=list(sys.argv), streams=(sys.stdout, sys.stderr))

sys.path.insert(0, {str(ROOT)!r})
before = state()
for name in ("losses", "models", "data", "evaluate", "train"):
    module = __import__(name)
    changed = {{key: (before[key], value) for key, value in state().items() if value != before[key]}}
    print(name, changed or "nothing")
"""


def test_an_import_changes_nothing_global(folder, python):
    (folder / "use.py").write_text(STATE)
    done = python(folder / "use.py", folder=folder)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [f"{name} nothing" for name in ("losses", "models", "data", "evaluate", "train")]
    assert [each.name for each in folder.iterdir()] == ["use.py"]


# ---------------------------------------------------------------- called from Python

def test_run_trains_as_the_command_does(tiny, tmp_path, capsys):
    model, rows, folder = result = train.run(
        version="v3", dataset=Path(tiny), train_size=10, test_size=5, epochs=1, classes=["ring", "star"], flip=False,
        lr=0.003, device="cpu", output=tmp_path / "python")
    assert result._fields == ("model", "rows", "folder") and isinstance(model, models.Autoencoder)
    assert not model.training and not any(module.training for module in model.modules())
    assert folder.parent == tmp_path / "python" and len(rows) == 1 and rows[0]["lr"] == 0.003
    logits, rebuilt = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 2) and rebuilt.shape == (2, 3, 32, 32)
    assert json.loads((folder / "config.json").read_text())["command"][:3] == ["python", "train.py", "--version"]

    assert train.main(["--version", "v3", "--dataset", tiny, "--train-size", "10", "--test-size", "5", "--classes",
                       "ring,star", "--epochs", "1", "--no-flip", "--lr", "0.003", "--device", "cpu", "--output",
                       str(tmp_path / "command")]) == 0
    other, content = evaluate.load_checkpoint(tmp_path / "command" / folder.name / "last.pt")
    for (name, weight), value in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(weight, value), name
    assert {key: value for key, value in rows[0].items() if "second" not in key} == {
        key: value for key, value in content["rows"][0].items() if "second" not in key}


@pytest.mark.parametrize("settings, message", [
    (dict(epoch=1), "epoch"), (dict(versoin="v4"), "versoin"),
    (dict(epochs=0), "'0': expected a whole number of at least 1"), (dict(epochs=1.5), "'1.5'"),
    (dict(lr="fast"), "'fast': expected a number"), (dict(version="v44"), "did you mean 'v4'"),
    (dict(variant="smoted"), "invalid choice: 'smoted'"), (dict(beta=True), "--beta"), (dict(separate="yes"), "yes"),
    (dict(constrain={"ring": 2.0}, variant="smote"), "at most 1"), (dict(dataset="nowhere"), "no data set 'nowhere'"),
    (dict(device="warp"), "--device warp"), (dict(beta=1, decoder="none"), "no decoder"),
    (dict(classes=["dog"]), "no class 'dog'"), (dict(classes=[1, 2]), "class"), (dict(resume="nowhere"), "nowhere"),
    (dict(seeds=2), "seeds"), (dict(sweep="kind"), "sweep"), (dict(list=True), "list"), (dict(jobs=2), "jobs"),
    (dict(help=True), "help")], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_run_raises_a_value_error_where_the_command_would_end(settings, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        train.run(**{"dataset": tiny, "version": "v3", "epochs": 1, "train_size": 20} | settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- their output closed

COMMANDS = {
    "train.py": ["--version", "v3", "--dataset", "{npz}", "--epochs", "1", "--train-size", "20", "--test-size", "10",
                 "--device", "cpu", "--output", "out"],
    "evaluate.py": ["--ckpt", "{run}/best.pt", "--images", "{picture}", "--device", "cpu", "--output", "out"],
    "models.py": ["v4"], "data.py": ["--dataset", "{npz}", "--output", "out"],
}
LEAVES = {"train.py": "*/metrics.json", "evaluate.py": "images/report.json", "data.py": "tiny_samples.png"}


@pytest.mark.parametrize("stdout", ["closed", "pipe"])
@pytest.mark.parametrize("program", COMMANDS)
def test_a_closed_output_is_no_error(program, stdout, trained, folder, python):
    """A pipe whose reader has ended (| head) ends the program quietly, training with the one line that says how to
    resume it; without any output (>&-) it does its work."""
    npz, run = trained
    names = dict(npz=npz, run=run, picture=next(run.glob("recon/*_ring.png")))
    done = python(ROOT / program, *[word.format(**names) for word in COMMANDS[program]], folder=folder, stdout=stdout)
    if program == "train.py" and stdout == "pipe":
        assert done.err.count("\n") == 1 and "pipe was closed" in done.err
        assert f"; resume with: python {ROOT / 'train.py'} --resume out/v3_" in done.err  # from another folder
    else:
        assert done.err == ""
    assert done.status in ((0,) if stdout == "closed" else (0, 141, -13))  # as of a program that SIGPIPE ends
    if stdout == "closed" and program in LEAVES:
        assert list((folder / "out").glob(LEAVES[program]))


def test_the_help_can_be_cut(folder, python):
    done = python(ROOT / "train.py", "-h", folder=folder, stdout="pipe")
    assert done.err == "" and done.status in (0, 141)
