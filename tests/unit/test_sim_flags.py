"""Flags of the simulator's programs, and the line that says how far a simulation is."""

from __future__ import annotations

import argparse
import sys

import pytest

from sim.fleet import progress
from sim.fleet.flags import add_spec_flags, spec_of
from sim.fleet.progress import ProgressLine


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_spec_flags(parser)
    return parser.parse_args(["--cluster", "1P+1D", *flags])


@pytest.mark.parametrize(
    ("flags", "node"),
    [
        ((), "8xA800"),
        (("--gpu", "H200"), "8xH200"),
        (("--gpu", "b200"), "8xB200"),
        (("--node", "8xH800"), "8xH800"),
        (("--node", "8xH800", "--gpu", "H100"), "8xH100"),
    ],
)
def test_a_gpu_is_a_node_of_eight(flags: tuple[str, ...], node: str) -> None:
    assert spec_of(parse(*flags)).node == node


def test_an_unknown_gpu_is_told_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--gpu", "H99")
    assert "no node with 'H99' in the simulator; there are A800," in capsys.readouterr().err


def test_the_line_is_drawn_for_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.0)
    ProgressLine(4, "1P+1D").update(2, 10.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = ProgressLine(4, "1P+1D")
    line.update(2, 10.0)
    line.clear()
    said = capsys.readouterr().err
    assert "1P+1D [###############...............] 2 of 4 requests, 10 s simulated" in said
    assert said.endswith("\r\033[K")
