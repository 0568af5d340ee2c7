"""The command line as a whole: help of one hand, exit codes, Ctrl-C, JSON, progress without a terminal, completion."""

import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from logging import getLogger

import pytest
import torch
from command_runs import component_folders, options
from tqdm.auto import tqdm

from modeling_manticore import ManticoreForCausalLM, __version__, progress
from modeling_manticore.commands import COMMANDS, KERNELS, NOTHING, OWN_FILE, POSITIONAL, RESUME, evaluate, main, usage
from modeling_manticore.commands.completion import flags_of
from modeling_manticore.commands.train import how_to_resume


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two component folders with one tokenizer, a text, and the folder `supernet` of both."""
    root = component_folders(tmp_path_factory.mktemp("command_line"))
    parts = [str(root / "gpt_neox"), str(root / "mamba2")]
    assert not main(["compose", *options(components=parts, output_folder=root / "supernet", num_blocks=2)])
    return root


# ---------------------------------------------------------------------- help
OWN = [name for name in COMMANDS if name != "train"]  # most options of train are transformers'


@pytest.mark.parametrize("command", OWN)
def test_help_reads_like_one_hand_wrote_it(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    forms = [] if command in OWN_FILE else ["[FILE.yaml | FILE.json]"]
    forms += [POSITIONAL[command]] if command in POSITIONAL else []
    usages = [f"manticore {command} {form} [--option value ...]" for form in forms]
    assert [line.removeprefix("usage: ").strip() for line in lines[: len(usages) + 1]] == [*usages, ""]
    text = COMMANDS[command]
    assert f"{text[0].upper()}{text[1:]}." in " ".join(printed.split()) and max(map(len, lines)) <= 80
    entries = re.findall(r"^  (-h|--\w+)[^\n]*?(?:\n {8,}|  +)(.*?)(?=\n  -|\n\n|\Z)", printed, re.M | re.S)
    assert len(entries) == len(re.findall(r"^  -", printed, re.M))
    for name, told in entries:
        told = " ".join(told.split())
        assert told[0].isupper() or told[0].islower() and ":" in told or told.startswith((".", "bible")), (name, told)
        assert told.endswith(".") and told.count("(default") <= 1 and "default False" not in told, (name, told)
        assert not re.search(r"\[|None|True|False", re.sub(r"\{.*?\}", "", told)) or name == "--blocks", (name, told)


QUICK = {
    "help": (["--help"], 0, "usage: manticore COMMAND"),
    "version": (["--version"], 0, f"manticore {__version__}"),
    "nothing": ([], 2, "command: got nothing, allowed are demo, plan"),
    "command": (["serch"], 2, "command: got 'serch', did you mean 'search'?"),
    "unlike": (["frobnicate"], 2, "command: got 'frobnicate', allowed are demo, plan"),
    "options": (["search", "--help"], 0, "usage: manticore search"),
    "option": (["search", "--stpes", "3"], 2, "--stpes: there is no such option; did you mean '--steps'?"),
    "stray": (
        ["discretize", "--model", "a", "--output_folder", "b", "--choice", "0", "1"],
        2,
        "got '1' after '--choice 0', which no option takes",
    ),
    "missing": (["compose"], 2, "required: --components"),
    "value": (["evaluate", "--rows", "many"], 2, "invalid int value: 'many'"),
    "range": (
        ["compose", "--components", "a", "b", "--output_folder", "c"],
        2,
        "num_blocks, blocks: give exactly one",
    ),
    "file": (["compose", "nowhere.yaml"], 2, "nowhere.yaml: it cannot be read"),
}


@pytest.mark.parametrize("case", QUICK)
def test_help_version_and_wrong_usage_come_before_anything_heavy(case, tmp_path):
    """In a process of its own, as the console script does it."""
    words, code, told = QUICK[case]
    run = (
        "import sys\n"
        "from manticore_command import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('heavy:', sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", run, *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == f"heavy: [] {code}", done.stderr
    assert told in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_command_loads_the_package_when_it_needs_it(folders, tmp_path):
    """Classes are registered although the command did not import them at once, and models load without bars."""
    run = (
        "import sys, manticore_command, modeling_manticore as m\n"
        "code = manticore_command.main(sys.argv[1:])\n"
        "print('names:', m.discretize.__name__, 'stitch' in dir(m), code)"
    )
    words = ["evaluate", *options(model=folders / "supernet", texts=folders / "text.txt", rows=2, row_length=16)]
    done = subprocess.run([sys.executable, "-c", run, *words], capture_output=True, text=True, check=True)
    assert "perplexity" in done.stdout and done.stdout.splitlines()[-1] == "names: discretize True 0"
    assert "\r" not in done.stderr and "%|" not in done.stderr


def test_the_general_help_tells_codes_and_resuming():
    told = usage()
    for word in ("Exit codes: 0 done", "1 the task failed", "2 bad usage", "130 stopped by Ctrl-C", "completion bash"):
        assert word in told
    assert max(len(line) for line in told.splitlines()) <= 130 and RESUME.keys() <= COMMANDS.keys()


# ---------------------------------------------------------------------- exit codes, Ctrl-C
def test_a_task_that_fails_is_not_bad_usage(folders, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(folders / "supernet", model)
    assert main(["verify", str(model)]) == 0
    with open(model / "mixing_manticore.py", "a") as file:
        file.write("# more\n")
    capsys.readouterr()
    assert main(["verify", str(model), "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert not found["verified"] and any("mixing_manticore.py" in problem for problem in found["problems"])
    assert printed.err.startswith("manticore: error: ") and len(printed.err.splitlines()) == 1
    assert main(["verify", str(tmp_path / "model"), "--patience", "0"]) == 2
    capsys.readouterr()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "run", full)
    assert main(["evaluate"]) == 1
    assert capsys.readouterr().err == "manticore: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line(command, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"modeling_manticore.commands.{command}.run", stop)
    assert main([command]) == 130
    assert capsys.readouterr().err == f"\nmanticore: stopped. {RESUME.get(command, NOTHING)}\n"


def test_ctrl_c_in_a_training_says_where_to_resume(folders, tmp_path):
    """With a real signal to a real process: exit 130, no traceback, and what it says can be done."""
    out = tmp_path / "out"
    words = ["train", *options(model=folders / "supernet", train_texts=folders / "text.txt", output_dir=out)]
    words += options(row_length=16, stage="finetune", max_steps=10_000, per_device_train_batch_size=2, save_steps=2)
    words += options(save_total_limit=1, report_to="none", use_cpu="true", logging_steps=500)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "import sys; from modeling_manticore.commands import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for background jobs
    )
    end = time.monotonic() + 200
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told + printed and "\r" not in told + printed
    (checkpoint,) = out.glob("checkpoint-*")
    assert told.splitlines()[-1] == f"manticore: stopped. {how_to_resume(out)}" and str(checkpoint) in told
    assert not list(out.glob(".*")) and not (out / "model.safetensors").exists()
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    again = [word if word != "10000" else str(step + 1) for word in words]
    assert main([*again, "--resume_from_checkpoint", str(checkpoint)]) == 0
    assert (out / "model.safetensors").is_file()


def test_before_the_first_checkpoint(tmp_path):
    assert "no checkpoint yet" in how_to_resume(tmp_path / "absent")


# ---------------------------------------------------------------------- for scripts
def test_json(folders, tmp_path, capsys):
    text, supernet, cut = str(folders / "text.txt"), str(folders / "supernet"), str(tmp_path / "cut")
    rows = {"row_length": 32, "batch_size": 4}

    def answer(words):
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = answer(
        ["discretize", *options(model=supernet, output_folder=cut, choice="0,1", calibration_texts=text, **rows)]
    )
    assert made["folder"] == cut and made["discretized"] and len(made["blocks"]) == 2
    told = answer(["describe", cut])
    model = ManticoreForCausalLM.from_pretrained(cut)
    assert told["parameters"] == made["parameters"] == sum(p.numel() for p in model.parameters())
    assert {key: told[key] for key in ("blocks", "components", "heads", "context", "cache_bytes_per_token")} == {
        key: made[key] for key in ("blocks", "components", "heads", "context", "cache_bytes_per_token")
    }
    assert main(["describe", cut]) == 0 and capsys.readouterr().out.strip() == model.describe()
    assert main(["describe", str(folders / "gpt_neox")]) == 2 and "'gpt_neox'" in capsys.readouterr().err
    measured = answer(["evaluate", *options(model=cut, texts=text, rows=8, **rows)])
    assert measured["texts"][text]["tokens"] == 8 * 31
    assert answer(["verify", cut])["verified"]


# ---------------------------------------------------------------------- progress
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_lines(monkeypatch):
    quiet, heard, watched = io.StringIO(), io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    assert list(progress.progress_bar(range(50), desc="rows", unit="row")) == list(range(50))
    assert quiet.getvalue() == ""  # it took less than twenty seconds
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(sys, "stderr", heard)
    for _ in progress.progress_bar(range(6), desc="rows", unit="row"):
        time.sleep(0.03)
    with progress.progress_bar(total=None, desc="all", unit="row") as bar:
        time.sleep(0.03)
        bar.update(3)
        bar.set_postfix_str("best 1", refresh=False)
    lines = heard.getvalue().splitlines()
    assert "\r" not in heard.getvalue() and "\x1b" not in heard.getvalue() and len(lines) >= 4
    assert re.fullmatch(r"rows: \d/6 row, .*row/s|rows: \d/6 row, .*s/row.*|rows: \d/6 row, .* left", lines[0])
    assert " left" in lines[0] and any(line.startswith("all: 3 row, ") for line in lines)
    monkeypatch.setattr(sys, "stderr", watched)
    assert type(progress.progress_bar(range(3), show=False)) is tqdm
    list(progress.progress_bar(range(3), desc="rows", unit="row", mininterval=0))
    assert "\r" in watched.getvalue() and "row/s" in watched.getvalue()


def test_a_training_without_a_terminal_is_lines(folders, tmp_path, capfd, monkeypatch):
    """No bar with control characters, no printed dictionaries: lines with rate, remaining time and loss."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    supernet, text = str(folders / "supernet"), str(folders / "text.txt")
    words = ["--model", supernet, "--train_texts", text, "--output_dir", str(tmp_path), "--stage", "finetune"]
    words += ["--max_steps", "4", "--per_device_train_batch_size", "2", "--row_length", "16", "--rows", "24"]
    assert main(["train", *words, "--logging_steps", "1", "--report_to", "none", "--learning_rate", "1e-4"]) == 0
    out, err = capfd.readouterr()
    assert "{'" not in out + err and "\r" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("finetune: ")]
    assert lines and re.search(r"finetune: \d/4 step, .*left", "\n".join(lines)) and "loss " in lines[-1]


# ---------------------------------------------------------------------- completion
@pytest.fixture(scope="module")
def scripts():
    """The completion script of every shell; making one imports every command."""
    found = {}
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            assert main(["completion", shell]) == 0
            found[shell] = sys.stdout.getvalue()
    return found


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(scripts, tmp_path):
    (tmp_path / "my recipe.yaml").write_text("")
    ask = (
        'complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _manticore; '
        'printf "%s|" "${COMPREPLY[@]}"; echo; }\n'
        "complete_words manticore d\ncomplete_words manticore search --hal\ncomplete_words manticore build my\n"
        "complete_words manticore search --min\ncomplete_words manticore build --allow\ncomplete_words manticore --v\n"
        "complete_words manticore train --resume\n"
    )
    done = subprocess.run(
        ["bash", "-c", scripts["bash"] + "\n" + ask], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "demo|discretize|describe|" and done.stderr == ""
    assert lines[1] == "--halving|--halving_tokens|--halving_learning_rate|"
    assert "my" in lines[2] and lines[3:6] == ["--min_components|", "--allow_local_sources|", "--version|"]
    assert "--resume_from_checkpoint" in lines[6]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell, scripts):
    for command in COMMANDS:
        assert command in scripts[shell]
        for flag in list(flags_of(command))[:3]:
            assert (flag if shell == "zsh" else f"-l {flag[2:]} ") in scripts[shell]
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=scripts[shell], text=True, check=True)


def test_another_shell(capsys):
    assert main(["completion", "tcsh"]) == 2 and "allowed are bash, zsh, fish" in capsys.readouterr().err


def test_no_advice_to_install_what_only_a_gpu_runs(capsys):
    from transformers.integrations import hub_kernels

    assert main(["completion", "bash"]) == 0 and capsys.readouterr().out
    logger = getLogger(KERNELS)
    advice, other = (
        logger.makeRecord(logger.name, 30, "", 0, text, (), None)
        for text in ("`f` is falling back to its reference PyTorch implementation because ...", "something else")
    )
    assert bool(logger.filter(advice)) == torch.cuda.is_available() and logger.filter(other)
    assert hub_kernels.logger.name == KERNELS
    assert "falling back to its reference PyTorch" in inspect.getsource(hub_kernels)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no os.openpty")
@pytest.mark.parametrize("arguments, told", [(["describe", "nowhere"], True), (["describe", "--help"], False)])
def test_a_terminal_hears_at_once_that_torch_is_loading(tmp_path, arguments, told):
    watched, terminal = os.openpty()
    command = [sys.executable, "-m", "manticore_command", *arguments]
    subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=terminal, timeout=120)
    os.close(terminal)
    heard = b""
    try:
        while more := os.read(watched, 2**16):
            heard += more
    except OSError:  # Linux's way to say that the terminal is closed
        pass
    finally:
        os.close(watched)
    begun = b"Loading torch and transformers ..."
    assert heard.startswith(begun) == told
    if told:
        assert b"\r\x1b[K" in heard and heard.index(b"\r\x1b[K") < heard.index(b"manticore: error: ")
