"""Keys and certificates: what OpenSSL and OpenSSH make of them, who may read them, when they are refused."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess

import pytest

from server.certificates import (
    check_private_key,
    check_server_certificate,
    hosts_of,
    load_certificate,
    make_certificates,
    public_fingerprint,
)

DAY = 86400.0


@pytest.fixture
def folder(tmp_path):
    make_certificates(tmp_path / "c", ["server.example", "10.0.0.1"], ["clinic", "bank"], valid_seconds=DAY)
    return tmp_path / "c"


def handshake(folder, authority, host):
    """A TLS handshake in memory with the certificate in ``folder``, by a client that trusts ``authority``."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = ssl.create_default_context(cafile=authority).wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert()


@pytest.mark.parametrize("host", ["server.example", "10.0.0.1", "localhost", "127.0.0.1"])
def test_client_that_trusts_the_authority_accepts_every_name(folder, host):
    assert handshake(folder, folder / "ca.crt", host)


def test_client_refuses_other_names_and_other_authorities(folder, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(folder, folder / "ca.crt", "elsewhere.example")
    make_certificates(tmp_path / "other", ["server.example"], [], valid_seconds=DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="self.signed|unable to get"):
        handshake(folder, tmp_path / "other" / "ca.crt", "server.example")


def test_private_keys_are_for_their_owner_only(folder):
    assert folder.stat().st_mode & 0o077 == 0
    private = list(folder.rglob("*.key"))
    assert len(private) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in private)


def test_issuing_again_keeps_authority_hosts_and_site_keys(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    make_certificates(folder, [], ["clinic", "court"], valid_seconds=2 * DAY)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"server.crt", "server.key"}
    assert (folder / "server" / "sites" / "court.pub").exists()
    assert set(hosts_of(load_certificate(folder / "server" / "server.crt"))) >= {"server.example", "10.0.0.1"}
    assert handshake(folder, folder / "ca.crt", "server.example")


def test_replacing_a_key_changes_that_site_only(folder):
    before = {site: public_fingerprint(folder / "server" / "sites" / f"{site}.pub") for site in ("bank", "clinic")}
    make_certificates(folder, [], [], replace=["clinic"], valid_seconds=DAY)
    assert public_fingerprint(folder / "server" / "sites" / "bank.pub") == before["bank"]
    assert public_fingerprint(folder / "server" / "sites" / "clinic.pub") != before["clinic"]


def test_two_halves_of_a_pair_have_one_fingerprint_which_is_openssh_s(folder):
    public, private = folder / "server" / "sites" / "bank.pub", folder / "sites" / "bank" / "site.key"
    assert public_fingerprint(public) == check_private_key(private)
    keygen = shutil.which("ssh-keygen")
    if keygen:
        printed = subprocess.run([keygen, "-lf", str(public)], capture_output=True, text=True, check=True).stdout
        assert public_fingerprint(public) in printed


def test_unusable_files_are_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"is not a public key in OpenSSH format"):
        public_fingerprint(folder / "ca.crt")
    with pytest.raises(ValueError, match=r"ca\.key is not a private key in OpenSSH format"):
        check_private_key(folder / "ca.key")
    key = folder / "sites" / "bank" / "site.key"
    key.chmod(0o644)
    with pytest.raises(ValueError, match=r"can be read by others: chmod 600"):
        check_private_key(key)


def test_server_certificate_must_be_complete_matching_and_valid(folder, tmp_path):
    server, other = folder / "server", tmp_path / "other" / "server"
    assert check_server_certificate(server)
    make_certificates(tmp_path / "other", ["x"], [], valid_seconds=DAY)
    shutil.copy(other / "server.key", server / "server.key")
    with pytest.raises(ValueError, match=r"server\.key is not the key of server\.crt"):
        check_server_certificate(server)
    shutil.copy(other / "server.crt", server / "server.crt")
    with pytest.raises(ValueError, match=r"ca\.crt did not issue server\.crt"):
        check_server_certificate(server)
    make_certificates(folder, [], [], valid_seconds=-1)
    with pytest.raises(ValueError, match=r"server\.crt expired on .* issue it anew with bouquet certs"):
        check_server_certificate(server)
    (server / "server.key").unlink()
    with pytest.raises(ValueError, match=r"server\.key is missing"):
        check_server_certificate(server)


def test_hosts_are_needed_once_and_site_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"--host is needed"):
        make_certificates(tmp_path, [], ["a"], valid_seconds=DAY)
    for name in ("../a", "é", "-x"):
        with pytest.raises(ValueError, match=rf"--site must be 1 to 100 letters.*'{name}'"):
            make_certificates(tmp_path, ["h"], [name], valid_seconds=DAY)
        with pytest.raises(ValueError, match=rf"--replace must be 1 to 100 letters.*'{name}'"):
            make_certificates(tmp_path, ["h"], [], replace=[name], valid_seconds=DAY)
    make_certificates(tmp_path, ["h"], ["a.b"], valid_seconds=DAY)
    assert (tmp_path / "server" / "sites" / "a.b.pub").is_file()


@pytest.mark.parametrize(
    "host", ["x y", "", "h:8000", "[::1]", "-h", "h-", "a..b", "h.", "é.org", "*", "x" * 64, "x." * 127 + "x"]
)
def test_what_no_site_could_dial_is_no_host(tmp_path, host):
    with pytest.raises(ValueError, match="--host must be an address, or a name"):
        make_certificates(tmp_path / "c", ["h", host], [], valid_seconds=DAY)
    assert not (tmp_path / "c").exists()


def test_names_and_addresses_of_every_kind_are_hosts(tmp_path):
    hosts = ["fl.example.org", "*.example.org", "node-1", "my_host", "203.0.113.7", "2001:db8::1", "x" * 63]
    make_certificates(tmp_path / "c", hosts, [], valid_seconds=DAY)
    assert set(hosts) < set(hosts_of(load_certificate(tmp_path / "c" / "server" / "server.crt")))


def test_a_folder_that_was_there_stays_open_to_those_who_could_enter_it(tmp_path):
    tmp_path.chmod(0o755)
    make_certificates(tmp_path, ["h"], [], valid_seconds=DAY)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
