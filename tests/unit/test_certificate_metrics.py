"""What Prometheus is told of certificates, before and after they are renewed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from baton.rpc.tls import Certificates, FrontCertificate, TlsConfig
from baton.telemetry import Metrics
from baton.worker.certificate_metrics import CertificateEnds
from tests.certificates import Authority, Pair

NAME = "baton_certificate_not_after_timestamp_seconds"
DAY_S = 24 * 3600.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def days_left(metrics: Metrics) -> dict[str, float]:
    """By use; as the alert counts them."""
    found = {}
    for line in metrics.render().decode().splitlines():
        if line.startswith(NAME):
            labels, _, value = line.removeprefix(NAME).partition(" ")
            found[labels] = (float(value) - time.time()) / DAY_S
    return found


def put(pair: Pair, over: Pair) -> None:
    over.cert.write_bytes(pair.cert.read_bytes())
    over.key.write_bytes(pair.key.read_bytes())


def test_a_process_tells_of_what_it_shows(authority: Authority) -> None:
    between, front = authority.issue("baton", days=30), authority.issue("localhost", days=5)
    metrics = Metrics()
    ends = CertificateEnds(metrics)
    config = TlsConfig(str(between.cert), str(between.key), str(authority.ca))
    ends.follow("internal", Certificates(config))
    ends.follow("public", FrontCertificate(str(front.cert), str(front.key)))
    expected = {'{use="internal"}': 30, '{use="public"}': 5}
    assert days_left(metrics) == pytest.approx(expected, abs=0.1)


def test_a_renewed_one_counts_without_a_connection_and_a_broken_one_does_not(
    authority: Authority,
) -> None:
    pair = authority.issue("baton", days=5)
    metrics = Metrics()
    config = TlsConfig(str(pair.cert), str(pair.key), str(authority.ca))
    CertificateEnds(metrics).follow("internal", Certificates(config))
    put(authority.issue("baton", days=90), over=pair)
    assert days_left(metrics) == pytest.approx({'{use="internal"}': 90}, abs=0.1)
    pair.cert.write_text("broken")
    assert days_left(metrics) == pytest.approx({'{use="internal"}': 90}, abs=0.1)


def test_one_that_clients_refuse_has_ended(authority: Authority) -> None:
    pair = authority.issue("localhost", expired=True)
    metrics = Metrics()
    CertificateEnds(metrics).follow("public", FrontCertificate(str(pair.cert), str(pair.key)))
    assert days_left(metrics)['{use="public"}'] < 0


def test_without_certificates_nothing_is_told() -> None:
    metrics = Metrics()
    CertificateEnds(metrics).follow("internal", None)
    assert days_left(metrics) == {}
