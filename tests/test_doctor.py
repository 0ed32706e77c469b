"""``enmp doctor`` sees what is amiss, says what to do, and has an exit code."""

import json
import os
from importlib import metadata

import pytest

from enmp_jax.cli import main as cli
from enmp_jax.runs import doctor


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


def test_a_machine_that_can_do_the_work(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert found["ok"] and "known answer in" in by_name["self-test"]["found"]
    assert list(by_name) == ["versions", "devices", "memory", "cache", "hub", "BLAS threads", "self-test"]


def test_what_is_amiss_is_a_line_and_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_test", lambda: 1 / 0)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["numpy>=99", "nothing_like_it>=1", "torch; extra == 'x'"]
    )
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    signs = {line[6:18].strip(): line[:4].strip() for line in out.splitlines() if line[:1] != " "}
    assert signs == {"versions": "NOT", "devices": "ok", "memory": "note", "cache": "note", "hub": "ok",
                     "BLAS threads": "note", "self-test": "NOT"}  # fmt: skip
    assert "-> pip install --upgrade 'numpy>=99' 'nothing_like_it>=1'\n" in out
    assert "-> export OPENBLAS_NUM_THREADS=1" in out and "ZeroDivisionError" in out


def test_a_search_that_finds_something_else_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.MaskSpec, "max_count", property(lambda spec: 1))  # two modules are wrong
    finding = doctor.self_test()
    assert finding.ok is False and "found another" in finding.found


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = doctor.cache_directory()
    assert finding.ok is False and "ENMP_CACHE" in finding.fix


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    finding = doctor.hub()
    assert (
        finding.ok is None
        and "127.0.0.1:9 does not answer" in finding.found
        and "work without" in finding.fix
    )
