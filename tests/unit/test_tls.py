"""Certificates: what is refused at the start, and what is taken up while a process runs."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import ConfigError
from baton.rpc.followed_files import FollowedFiles
from baton.rpc.tls import Certificates, FrontCertificate, TlsConfig, trusting_only
from baton.worker.cluster_options import ClusterOptions
from tests.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def config_of(pair: Pair, authority: Authority) -> TlsConfig:
    return TlsConfig(str(pair.cert), str(pair.key), str(authority.ca))


def put(pair: Pair, over: Pair) -> None:
    over.cert.write_bytes(pair.cert.read_bytes())
    over.key.write_bytes(pair.key.read_bytes())


def refusal(config: TlsConfig) -> str:
    with pytest.raises(ConfigError) as failure:
        Certificates(config)
    return failure.value.message


def test_a_good_pair_is_taken(authority: Authority) -> None:
    pair = authority.issue("baton", "decode-0.example.com")
    pems = Certificates(config_of(pair, authority)).current()
    assert pems.cert == pair.cert.read_bytes()
    assert pems.ca == authority.ca.read_bytes()
    assert "PRIVATE" not in repr(pems)


def test_files_that_are_not_there_or_not_what_they_should_be(
    authority: Authority, tmp_path: Path
) -> None:
    good = config_of(authority.issue("baton"), authority)
    junk = tmp_path / "junk"
    junk.write_text("-----BEGIN NOTHING-----\n")
    for name in ("cert", "key", "ca"):
        missing = str(tmp_path / f"no-{name}")
        assert refusal(replace(good, **{name: missing})) == (
            f"cannot read {missing}: No such file or directory"
        )
        assert str(junk) in refusal(replace(good, **{name: str(junk)}))
    assert "PEM" in refusal(replace(good, ca=str(junk)))


def test_a_key_of_another_certificate(authority: Authority) -> None:
    one, other = authority.issue("baton"), authority.issue("baton")
    config = config_of(Pair(one.cert, other.key), authority)
    assert refusal(config) == f"{other.key} is not the private key of {one.cert}"


def test_what_peers_would_refuse_is_refused_at_the_start(
    authority: Authority, tmp_path: Path
) -> None:
    expired = refusal(config_of(authority.issue("baton", expired=True), authority))
    assert "peers would refuse" in expired
    assert "expired" in expired
    stranger = Authority(tmp_path, "stranger").issue("baton")
    assert "unable to get local issuer certificate" in refusal(config_of(stranger, authority))
    nameless = refusal(config_of(authority.issue("else"), authority))
    assert "'baton'" in nameless
    assert "mismatch" in nameless


def test_another_name_of_the_cluster(authority: Authority) -> None:
    config = config_of(authority.issue("blue.baton.internal"), authority)
    Certificates(replace(config, peer_name="blue.baton.internal"))


def test_options_belong_together(authority: Authority) -> None:
    assert ClusterOptions().open_certificates() is None
    with pytest.raises(ConfigError, match="all three"):
        ClusterOptions(tls_cert="a", tls_key="b").open_certificates()
    pair = authority.issue("baton")
    options = ClusterOptions(
        tls_cert=str(pair.cert), tls_key=str(pair.key), tls_ca=str(authority.ca)
    )
    assert options.open_certificates() is not None


def test_a_new_pair_is_taken_up(authority: Authority) -> None:
    pair, new = authority.issue("baton"), authority.issue("baton")
    certificates = Certificates(config_of(pair, authority))
    first = certificates.current()
    assert certificates.current() is first
    put(new, over=pair)
    second = certificates.current()
    assert (second.cert, second.key) == (new.cert.read_bytes(), new.key.read_bytes())
    assert certificates.current() is second


def test_half_of_a_pair_is_not_taken_up(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair, new = authority.issue("baton"), authority.issue("baton")
    certificates = Certificates(config_of(pair, authority))
    first = certificates.current()
    pair.cert.write_bytes(new.cert.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert certificates.current() is first
        assert certificates.current() is first
    assert len(caplog.records) == 1  # once per change
    pair.key.write_bytes(new.key.read_bytes())
    assert certificates.current().cert == new.cert.read_bytes()


def test_a_bad_or_missing_pair_leaves_the_old_one_in_use(authority: Authority) -> None:
    pair = authority.issue("baton")
    certificates = Certificates(config_of(pair, authority))
    first = certificates.current()
    put(authority.issue("baton", expired=True), over=pair)
    assert certificates.current() is first
    pair.key.unlink()
    assert certificates.current() is first


def test_a_mounted_secret_changes_by_a_link(authority: Authority, tmp_path: Path) -> None:
    """As Kubernetes does: all files at once, by renaming a link over another one."""
    pairs = [authority.issue("baton") for _ in range(2)]
    for number, pair in enumerate(pairs):
        version = tmp_path / f"v{number}"
        version.mkdir()
        for name, path in (("crt", pair.cert), ("key", pair.key), ("ca", authority.ca)):
            (version / name).write_bytes(path.read_bytes())
    (tmp_path / "data").symlink_to("v0")
    paths = [str(tmp_path / "data" / name) for name in ("crt", "key", "ca")]
    certificates = Certificates(TlsConfig(*paths))
    (tmp_path / "next").symlink_to("v1")
    (tmp_path / "next").rename(tmp_path / "data")
    assert certificates.current().cert == pairs[1].cert.read_bytes()


def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("0")
    late = ["22", ""]

    def load() -> str:
        text = file.read_text()
        if text == "1" and late:
            file.write_text(late.pop(0))
        return text

    followed = FollowedFiles((file,), load)
    file.write_text("1")
    os.utime(file, ns=(1, 1))
    assert followed.current() == "0"
    assert followed.current() == "22"


@pytest.mark.parametrize("named", [False, True])
async def test_a_server_of_python_shows_the_new_one(authority: Authority, named: bool) -> None:
    pair, new = authority.issue("localhost"), authority.issue("localhost")
    front = FrontCertificate(str(pair.cert), str(pair.key))
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=front.context
    )
    port = server.sockets[0].getsockname()[1]

    async def look() -> bytes | None:
        context = ssl.create_default_context(cafile=str(authority.ca))
        context.check_hostname = named
        host = "localhost" if named else None
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=host
        )
        found: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return found

    def der(path: Path) -> bytes:
        return ssl.PEM_cert_to_DER_cert(path.read_text())

    assert await look() == der(pair.cert)
    put(new, over=pair)
    assert await look() == der(new.cert)
    pair.cert.write_text("broken")
    assert await look() == der(new.cert)
    server.close()
    await server.wait_closed()


def test_clients_are_warned_of(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.issue("localhost", expired=True)
    FrontCertificate(str(pair.cert), str(pair.key))
    assert "expired" in caplog.text
    with pytest.raises(ConfigError, match="is not the private key"):
        FrontCertificate(str(pair.cert), str(authority.issue("x").key))


def test_trusting_one_certificate_only(authority: Authority) -> None:
    context = trusting_only(str(authority.issue("x").cert))
    assert context.verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(ConfigError):
        trusting_only("/missing")
