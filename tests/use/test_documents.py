"""What the pages for users say is true: links lead somewhere, commands parse, examples run, quoted sentences exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.cli import LightningCLI
from PIL import Image

from lit_matting import cutting
from lit_matting.cli import main
from lit_matting.page import serving
from lit_matting.pipeline import MattingPipeline

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
USER_PAGES = [ROOT / "README.md", ROOT / "docs/USING.md", ROOT / "docs/TROUBLESHOOTING.md"]
PLACEHOLDERS = {"E.yaml": "configs/experiment/demo.yaml"}
MATTE_AND_DEMO = {"matte": cutting.parser, "demo": serving.parser}


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command of the pages for users: where it stands, and its words after `python`."""
    for page in USER_PAGES:
        lines = [line for block in blocks(page) for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", without_blocks(page.read_text()))
        for line in lines:
            found = re.match(r"(?:\w+=\S+ )*python ((?:-m lit_matting|tools/\S+\.py) .*)", line)
            if found:
                yield page.name, shlex.split(found[1].replace("\\|", "|"), comments=True)


@pytest.mark.slow
def test_commands_of_the_pages_are_understood_by_their_parsers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: ran.append(cli))
    monkeypatch.setenv("MATTING_DATA", ".")
    monkeypatch.chdir(ROOT)
    seen: list[tuple[str, list[str]]] = []
    for page, words in commands():
        if words[0] != "-m":
            continue
        command, arguments = words[2], list(words[3:])
        if not arguments:
            continue  # a mention
        if (page, words) in seen:
            continue
        seen.append((page, words))
        if command in MATTE_AND_DEMO:
            MATTE_AND_DEMO[command]().parse_intermixed_args(arguments)
            continue
        for place in range(len(arguments)):
            if arguments[place - 1] == "--ckpt_path":
                arguments[place] = str(checkpoint)
            arguments[place] = PLACEHOLDERS.get(arguments[place], arguments[place])
        assert main([command, *arguments]) == 0, words
    # nothing of this passes because nothing was found
    assert {words[2] for _, words in seen} == {"fit", "test", "predict", "matte", "demo"}
    assert len(ran) == sum(words[2] not in MATTE_AND_DEMO for _, words in seen)
    writer = ran[-1].config.predict.trainer.callbacks[-1]  # the last command of USING.md
    assert (writer.class_path, writer.init_args.folder) == ("callbacks.PredictionWriter", "mattes")


def test_tools_named_in_the_pages_have_the_options_they_are_given() -> None:
    found = 0
    for page, words in commands():
        if not words[0].startswith("tools/"):
            continue
        text = (ROOT / words[0]).read_text()
        for word in words[1:]:
            if word.startswith("--") and not word.startswith(("--model.", "--data.", "--trainer.")):
                assert f'"{word}"' in text, (page, words)
                found += 1
    assert found >= 5


@pytest.mark.parametrize("page", USER_PAGES[1:], ids=names(USER_PAGES[1:]))
def test_options_named_in_the_pages_exist(page: Path) -> None:
    known = {"--config", "--ckpt_path", "--no-deps"}  # Lightning's, and pip's
    for make in MATTE_AND_DEMO.values():
        known |= {name for action in make()._actions for name in action.option_strings}
    spans = re.findall(r"`([^`\n]+)`", without_blocks(page.read_text()))
    named = {
        name
        for span in spans
        if "pip install" not in span and not span.startswith("python tools")
        for name in re.findall(r"(?<![\w-])--[\w-]+(?![\w.-])", span)
    }
    assert named
    assert named - known <= {"--shards", "--size", "--format"}


def test_dotted_settings_named_in_the_pages_are_settings_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda cli: parsed.append(cli))
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: None)
    monkeypatch.setenv("MATTING_DATA", "data")
    text = "".join(without_blocks(page.read_text()) for page in USER_PAGES)
    given = re.findall(r"`(--(?:model|data|trainer)\.[\w.]+)(?: ([^`\s]+))?`", text)
    assert ("--trainer.accumulate_grad_batches", "2") in given
    flags = [f"{name}={value}" for name, value in given if value and not value.startswith("configs/")]
    flags.append("--data.init_args.max_bad_fraction=0.01")
    assert main(["fit", "--config", str(ROOT / "configs/experiment/sd21_joint.yaml"), *flags]) == 0
    config = parsed[0].config.fit
    assert config.model.backbone.init_args.pretrained == "/weights/sd21"
    assert config.data.init_args.on_bad_sample == "skip"  # "as in the `sd21_*` experiments"
    assert config.trainer.accumulate_grad_batches == 2


def test_examples_in_python_run(
    checkpoint: Path, tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("photo.jpg", "a.jpg", "b.jpg")):
        Image.fromarray(picture(40, 50 + 10 * number, number)).save(name)
    (tmp_path / "outputs/demo").mkdir(parents=True)
    (tmp_path / "outputs/demo/last.ckpt").symlink_to(checkpoint)
    pushed: list[str] = []
    monkeypatch.setattr(MattingPipeline, "push_to_hub", lambda self, name: pushed.append(name))
    scope: dict[str, object] = {}
    examples = [code for page in USER_PAGES for code in blocks(page, "python")]
    for code in examples:
        exec(compile(code, "example", "exec"), scope)
    assert len(examples) >= 7
    assert pushed == ["me/matting"]
    assert Image.open("umbrella.png").mode == "RGBA"
    assert Image.open("the star.png").mode == "RGB"
    assert [len(item) if isinstance(item, list) else item.phrase for item in scope["nested"]] == [2, "the cat"]
    described = next(block for block in blocks(USER_PAGES[1]) if block.startswith("model "))
    labels = [line.split()[0] for line in scope["matting"].describe().splitlines()]
    assert [line.split()[0] for line in described.splitlines()] == labels


@cache
def sentences() -> list[re.Pattern[str]]:
    """Return a pattern for every text in the code long enough to be a sentence: `.+` for what is filled in."""
    found = set()
    for package in ("lit_matting", "data_modules", "callbacks", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                pattern, letters = "", 0
                for part in parts:
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        letters += len(part.value)
                        # what logging fills in
                        pattern += re.sub(r"%(?:\\?\.\d)?[sdrfg]", ".+", re.escape(part.value))
                    else:
                        pattern += ".+"
                if letters >= 15:
                    found.add(pattern)
    return [re.compile(pattern) for pattern in sorted(found)]


def said_in_the_code(sentence: str) -> bool:
    return any(pattern.fullmatch(sentence) for pattern in sentences())


def test_sentences_that_troubleshooting_quotes_are_in_the_code() -> None:
    text = USER_PAGES[2].read_text()
    quoted = [line.replace("\\`", "`") for line in re.findall(r"^ *> (.*)$", text, re.M)]
    table = [row.split(" | ")[0] for row in re.findall(r"^\| (.*)$", text, re.M)]
    quoted += [line.replace("\\`", "`") for line in table if line.endswith(".") or "Gradio" in line]
    assert len(quoted) >= 25
    for sentence in quoted:
        assert said_in_the_code(sentence), sentence
    assert not said_in_the_code("photo.jpg is not as red as it should be, sadly.")
