"""Protocols are locked, and deviations from them are found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from lit_matting.checks import InputError
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


def right_counts() -> list[ReferringSample]:
    """Return the samples of RefMatte-RW100: 221 instances of 100 images, four phrases each."""
    return samples(79, 2, 4) + [replace(sample, key=f"more/{sample.key}") for sample in samples(21, 3, 4)]


def following(**other: object) -> Observed:
    """Return what a run of RefMatte-RW100 at 512 x 512 is seen to do, with a few things changed."""
    seen = {
        "image_size": 512,
        "metric_sizes": frozenset({(512, 512)}),
        "source_sizes": frozenset({512}),
        "interpolations": frozenset({"area"}),
        "datasets": frozenset({"refmatte/rw100"}),
        "boundary": True,
        "errors": "matlab",
    }
    return Observed(**{**seen, **other})


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


def test_a_run_that_follows_deviates_in_nothing() -> None:
    protocol, taken = load_protocol("refmatte-rw100"), right_counts()
    observed = following()
    assert deviations(protocol, taken, observed) == []
    native = load_protocol("refmatte-rw100-native")
    assert deviations(native, taken, observed) == ["errors at 512 x 512 instead of each image's own size"]
    own = following(source_sizes=frozenset({"native"}), metric_sizes=frozenset({(600, 400), (512, 512)}))
    assert deviations(native, taken, own) == []


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"source_sizes": frozenset({1024}), "metric_sizes": frozenset({(1024, 1024)})}, "errors at 1024 x 1024"),
        ({"source_sizes": frozenset()}, "errors at a size not known"),
        ({"datasets": frozenset({"anything"})}, "data set anything instead of RefMatte_RW_100"),
        ({"datasets": frozenset({"refmatte/rw100", "p3m10k/test"})}, "data set p3m10k/test and refmatte/rw100 instead"),
        ({"datasets": frozenset()}, "data set not known"),
        ({"image_size": None}, "input size not known instead of 512"),
        ({"interpolations": frozenset({"area", "nearest"})}, "interpolation nearest instead of area"),
        ({"interpolations": frozenset()}, "interpolation not known"),
        ({"boundary": False}, "no gradient and connectivity errors"),
        ({"errors": "p3m"}, "errors by the p3m dialect instead of matlab"),
    ],
)
def test_right_counts_alone_do_not_follow_a_protocol(seen, words) -> None:
    protocol = load_protocol("refmatte-rw100-native")
    own = {"source_sizes": frozenset({"native"}), "metric_sizes": frozenset({(600, 400)})}
    (found,) = deviations(protocol, right_counts(), following(**{**own, **seen}))
    assert found.startswith(words)


def test_deviations_are_told_in_words() -> None:
    found = deviations(
        load_protocol("refmatte-rw100"),
        samples(100, 2, 3),
        following(image_size=768, metric_sizes=frozenset({(768, 768), (4, 6)})),
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
