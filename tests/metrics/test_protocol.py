"""Protocols are locked, and deviations from them are found."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from lit_matting.checks import InputError
from lit_matting.metrics import protocol as protocols
from lit_matting.metrics.protocol import FOLDER, LOCKED, Observed, deviations, digest, load_protocol
from lit_matting.metrics.score_card import ReferringSample


def samples(images: int, instances: int, phrases: int) -> list[ReferringSample]:
    return [
        ReferringSample(
            f"refmatte/{image}", f"phrase {phrase}", "basic", "", instance, instances, 0.1, np.zeros((1, 16))
        )
        for image in range(images)
        for instance in range(instances)
        for phrase in range(phrases)
    ]


def test_every_locked_protocol_is_there_and_unchanged() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(LOCKED)
    for name in LOCKED:
        assert load_protocol(name).sha256 == LOCKED[name]


def test_the_published_counts() -> None:
    test, real = load_protocol("refmatte-test"), load_protocol("refmatte-rw100")
    assert (test.images, test.instances, test.per_instance) == (2500, 6243, 4)
    assert (real.images, real.instances, real.per_instance) == (100, 221, 4)
    for protocol in (test, real):
        assert (protocol.input_size, protocol.metric_size, protocol.average) == (512, 512, "instance")
    assert load_protocol("refmatte-test-native").metric_size == "native"


def test_the_digest_ignores_comments_and_order_but_no_value() -> None:
    content = yaml.safe_load((FOLDER / "refmatte-test.yaml").read_text())
    assert digest(dict(reversed(content.items()))) == LOCKED["refmatte-test"]
    content["input_size"] = 513
    assert digest(content) != LOCKED["refmatte-test"]


def test_a_changed_protocol_under_a_locked_name_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "refmatte-test.yaml").read_text().replace("input_size: 512", "input_size: 1024"))
    with pytest.raises(InputError, match="not the locked one"):
        load_protocol(path)
    path.write_text(path.read_text().replace("name: refmatte-test", "name: refmatte-1024"))
    assert load_protocol(path).input_size == 1024


def test_a_run_that_follows_deviates_in_nothing(monkeypatch) -> None:
    protocol = load_protocol("refmatte-rw100")
    monkeypatch.setattr(protocols, "LOCKED", LOCKED)
    taken = samples(79, 2, 4) + [
        ReferringSample(f"extra/{image}", f"phrase {phrase}", "basic", "", instance, 3, 0.1, np.zeros((1, 16)))
        for image in range(21)
        for instance in range(3)
        for phrase in range(4)
    ]
    observed = Observed(512, frozenset({(512, 512)}))
    assert deviations(protocol, taken, observed) == []
    assert deviations(load_protocol("refmatte-rw100-native"), taken, observed) == [
        "errors at 512 x 512 instead of each image's own size"
    ]


def test_deviations_are_told_in_words() -> None:
    found = deviations(
        load_protocol("refmatte-rw100"), samples(100, 2, 3), Observed(768, frozenset({(768, 768), (4, 6)}))
    )
    assert found == [
        "200 of 221 instances",
        "200 instances without exactly 4 expressions",
        "input size 768 instead of 512",
        "errors at 4 x 6 and 1 other sizes instead of 512 x 512",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("average: instance", "average: image"), "must be one of phrase, instance"),
        (("input_size: 512\n", ""), "input_size"),
        (("images: 100", "images: many"), "invalid literal"),
        (("  images: 100", "  images: 100\n  sides: 3"), "no field split.sides"),
        (("name: refmatte-rw100", "name: [a\n"), "no YAML"),
    ],
)
def test_a_malformed_protocol_is_explained(tmp_path, change, words) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "refmatte-rw100.yaml").read_text().replace(*change))
    with pytest.raises(InputError, match=words):
        load_protocol(path)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match="refmatte-test"):
        load_protocol("refmatte")
