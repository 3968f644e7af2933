"""``bouquet server up`` and ``bouquet site up`` as a user starts them: who gets in, and what the refused are told."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request

import pytest

from server.certificates import make_certificates
from server.services import node_config
from tests.server.commands import SMALL, Service, bouquet, free_port, service, superlink, write_site_files
from tests.server.listeners import answering, hang_up

pytestmark = pytest.mark.timeout(600)
DAY = 86400.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("services")
    write_site_files(folder / "data")
    make_certificates(folder / "certs", ["127.0.0.1"], ["bank", "clinic"], valid_seconds=90 * DAY)
    make_certificates(folder / "others", ["127.0.0.1"], ["bank"], valid_seconds=DAY)
    return folder


@contextlib.contextmanager
def server(home, certificates="certs", state="server", port=None):
    port = port or free_port()
    words = ("--certificates", str(home / certificates / "server"), "--host", "127.0.0.1", "--port", str(port))
    with service(home / state, "server", "up", *words, "--home", str(home / state / "home")) as running:
        running.wait_for("the SuperLink listens")
        yield running, f"127.0.0.1:{port}"


def site(home, address, name="bank", *, certificates="certs", key="certs", data="bank"):
    words = ["--name", name, "--superlink", address, "--data", str(home / "data" / f"{data}.jsonl")]
    words += ["--root-certificates", str(home / certificates / "ca.crt")]
    words += ["--key", str(home / key / "sites" / name / "site.key"), "--home", str(home / f"site-{name}")]
    return service(home / f"site-{name}", "site", "up", *words)


@pytest.fixture(scope="module")
def running(home):
    with server(home) as started:
        started[0].wait_for("may join", times=2)
        yield started


def test_node_config_is_what_flower_reads_back(tmp_path):
    from flwr.common.config import parse_config_args

    data = tmp_path / "a b.jsonl"
    data.write_text("{}")
    read = parse_config_args([node_config("north-1", data, tmp_path, ["device=cpu"])])
    assert read == {"site": "north-1", "data": str(data), "private": str(tmp_path / "private"), "device": "cpu"}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("site=b", "KEY=VALUE"),
        ("device", "KEY=VALUE"),
        ("device='cpu'", "apostrophe"),
        ("privte=/secure/folder", "node config privte=... is unknown"),
        ("device=tpu", "node config device must be one of auto, cpu, cuda, got 'tpu'"),
        ("preference=1,high", "node config preference must be numbers"),
    ],
)
def test_node_settings_that_would_be_misread_are_refused(tmp_path, word, text):
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=text):
        node_config("a", tmp_path / "x.jsonl", tmp_path, [word])


@pytest.mark.processes
@pytest.mark.parametrize("name", ["../../x", "-x", "a.", "é", "x" * 101])
def test_site_of_an_unsafe_name_makes_no_folder(tmp_path, name):
    words = ("site", "up", f"--name={name}", "--superlink", "127.0.0.1:9", "--data", "x", "--insecure")
    refused = bouquet(*words, cwd=tmp_path, prefix=["env", f"HOME={tmp_path / 'home'}"])
    assert (refused.returncode, "--name must be 1 to 100 letters" in refused.stderr) == (2, True), refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("certs", "new", "--host", "h", "--days", "0"), "'--days': 0 is not in the range 1<=x<=3650"),
        (("certs", "new", "--host", "h", "--days", "999999999"), "not in the range 1<=x<=3650"),
        (("certs", "new", "--host", "x y"), "--host must be an address, or a name of at most 253"),
        (("certs", "file", "--host", "h"), "cannot make the folder file: File exists"),
        (("certs", "file/new", "--host", "h"), "cannot make the folder file/new: Not a directory"),
    ],
)
def test_certificates_that_nobody_could_use_are_not_made(tmp_path, words, text):
    (tmp_path / "file").write_text("mine")
    refused = bouquet(*words, cwd=tmp_path)
    assert refused.returncode == 2
    assert text in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.processes
def test_registered_site_connects_and_is_remembered(home, running):
    with site(home, running[1]) as bank:
        bank.wait_for("SuperNode ID:")
        assert (home / "site-bank" / "status").read_text() == "connected\n"
    sites = json.loads((home / "server" / "home" / "sites.json").read_text())
    assert sorted(facts["site"] for facts in sites.values()) == ["bank", "clinic"]
    assert bank.process.returncode == 0, bank.printed()


@pytest.mark.processes
def test_unknown_key_is_refused_with_its_fingerprint_on_both_ends(home, running):
    server_up, address = running
    key = "SHA256:"
    with site(home, address, key="others") as stranger:
        stranger.wait_for("refused site bank (key SHA256:")
        key = stranger.printed().partition("refused site bank (key ")[2].partition(")")[0]
    server_up.wait_for(f"key {key} is not registered; if it is a site's, put its public key into sites/")


@pytest.mark.processes
def test_key_that_comes_and_goes_as_a_file_is_registered_and_refused(home, running):
    server_up, address = running
    make_certificates(home / "late", ["127.0.0.1"], ["court"], valid_seconds=DAY)
    with site(home, address, "court", key="late") as court:
        court.wait_for("refused site court")
        shutil.copy(home / "late" / "server" / "sites" / "court.pub", home / "certs" / "server" / "sites")
        server_up.wait_for("court may join")
        court.wait_for("SuperNode ID:")
    (home / "certs" / "server" / "sites" / "court.pub").unlink()
    server_up.wait_for("court may no longer join")
    with site(home, address, "court", key="late") as court:
        court.wait_for("refused site court")


@pytest.mark.processes
def test_wrong_authority_is_refused_on_both_ends(home, running):
    server_up, address = running
    with site(home, address, certificates="others") as bank:
        assert bank.process.wait(60) == 2
        assert "was not issued by the authority in --root-certificates" in bank.printed()
    server_up.wait_for("the client does not trust this server's authority")


@pytest.mark.processes
def test_plain_http_to_a_tls_server_is_refused_on_both_ends(home, running):
    server_up, address = running
    data = str(home / "data" / "bank.jsonl")
    plain = bouquet(
        "site", "up", "--name", "bank", "--superlink", address, "--data", data, "--insecure",
        "--home", str(home / "plain"), cwd=home,
    )  # fmt: skip
    assert plain.returncode == 2
    assert "speaks TLS, not plain HTTP: add --root-certificates ca.crt" in plain.stderr
    server_up.wait_for("plain HTTP, this server speaks TLS")


@pytest.mark.processes
def test_site_waits_where_connections_are_closed_at_once_until_there_is_a_server(home):
    with contextlib.ExitStack() as stack:
        with answering(hang_up) as address:
            bank = stack.enter_context(site(home, address))
            bank.wait_for(f"waiting: {address} closed the connection within the TLS handshake")
        stack.enter_context(server(home, state="late", port=int(address.rpartition(":")[2])))
        bank.wait_for("SuperNode ID:")


@pytest.mark.processes
def test_tls_to_a_plain_server_is_refused(home):
    with superlink(home / "plain-server") as address, site(home, address) as bank:
        assert bank.process.wait(60) == 2
        assert "speaks plain HTTP, not TLS" in bank.printed()


@pytest.mark.processes
def test_expired_certificate_is_refused_on_both_ends(home):
    make_certificates(home / "old", ["127.0.0.1"], ["bank"], valid_seconds=-1)
    folder, port = home / "old" / "server", free_port()
    words = ("--certificates", str(folder), "--host", "127.0.0.1", "--port", str(port))
    refused = bouquet("server", "up", *words, "--home", str(home / "again"), cwd=home)
    assert refused.returncode == 2
    assert "server.crt expired on" in refused.stderr
    # A server that was started before it expired.
    gate = ["--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"]
    gate += ["--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key")]
    gate += ["--ssl-ca-certfile", str(folder / "ca.crt")]
    with service(home / "old-server", "-P", "-m", "server.gate", *gate, program="python") as server_up:
        server_up.wait_for("Uvicorn running")
        with site(home, f"127.0.0.1:{port}", certificates="old", key="old") as bank:
            assert bank.process.wait(60) == 2
            assert "has expired: on the server, bouquet certs DIR, then restart it" in bank.printed()
        server_up.wait_for("the client says server.crt has expired")


@pytest.mark.processes
def test_site_comes_back_after_the_servers_restart_with_a_new_certificate(home):
    """Keys stay registered, and nobody starts anything at the site."""
    port = free_port()
    with contextlib.ExitStack() as sites:
        with server(home, state="restarted", port=port) as (server_up, address):
            server_up.wait_for("may join", times=2)
            clinic = sites.enter_context(site(home, address, "clinic", data="clinic"))
            clinic.wait_for("SuperNode ID:")
        make_certificates(home / "certs", [], [], valid_seconds=90 * DAY)
        with server(home, state="restarted", port=port) as (server_up, _):
            wait_until_back(clinic)
            assert "may join" not in server_up.printed()


def wait_until_back(site_up: Service) -> None:
    """Until Flower's SuperNode has reached the server again, or ours has started a new one."""
    deadline = time.monotonic() + 120
    while "Connection successful after" not in site_up.printed() and site_up.printed().count("SuperNode ID:") < 2:
        assert time.monotonic() < deadline, site_up.printed()
        time.sleep(0.2)


@pytest.mark.processes
def test_killed_site_rejoins_without_a_restart_of_the_server(home, running):
    server_up, address = running
    with site(home, address, "clinic", data="clinic") as clinic:
        clinic.wait_for("SuperNode ID:")
        clinic.kill()
    with site(home, address, "clinic", data="clinic") as clinic:
        server_up.wait_for("clinic is still counted as connected from before")
        clinic.wait_for("SuperNode ID:", timeout=180)


@pytest.mark.processes
def test_orders_from_other_machines_are_refused(home, running):
    """Another machine comes through a local proxy here; tests/server/test_network.py has real ones."""
    server_up, address = running
    context = ssl.create_default_context(cafile=str(home / "certs" / "ca.crt"))
    forwarded = urllib.request.Request(
        f"https://{address}/v1/control/list-runs", data=b"", headers={"X-Forwarded-For": "203.0.113.9"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(forwarded, context=context, timeout=10)
    assert b"takes orders from its own machine only" in refused.value.read()
    server_up.wait_for("refused /v1/control/list-runs from 203.0.113.9")


@pytest.mark.processes
def test_doctor_asks_the_sites_before_a_run(home, running):
    """One site is fine, the other's file lacks the columns: the doctor says which and what, and nothing was trained."""
    (home / "data" / "odd.jsonl").write_text('{"question": "?"}\n' * 20)
    settings = ("federation=remote", f"federation.superlink={running[1]}", "partition=files", *SMALL, "--json")
    settings += (f"federation.root_certificates={home / 'certs' / 'ca.crt'}", "federation.min_sites=1")
    with site(home, running[1]) as bank, site(home, running[1], "clinic", data="odd") as clinic:
        for site_up in (bank, clinic):
            site_up.wait_for("SuperNode ID:")
        examined = bouquet("doctor", *settings, cwd=home, timeout=500)
    told = {finding["check"]: finding for finding in json.loads(examined.stdout)["findings"]}
    assert told["superlink"]["state"] == "ok", examined.stdout
    assert (examined.returncode, told["sites"]["state"]) == (1, "failed"), examined.stdout
    assert "joined: bank (32 examples); clinic refused: the data of site 'clinic'" in told["sites"]["text"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["server", "up"], "--certificates DIR/server is needed"),
        (["server", "up", "--insecure"], "--insecure is for --host 127.0.0.1"),
        (
            ["server", "up", "--certificates", "certs/server", "--host", "192.0.2.7"],
            "bouquet certs DIR --host 192.0.2.7",
        ),
    ],
)
@pytest.mark.processes
def test_unsafe_or_impossible_servers_are_not_started(home, tmp_path, words, text):
    refused = bouquet(*words, "--home", str(tmp_path), cwd=home)
    assert refused.returncode == 2
    assert text in refused.stderr


@pytest.mark.processes
def test_taken_port_and_shadowing_folder_are_named(home, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        words = ("server", "up", "--insecure", "--host", "127.0.0.1", "--port", port, "--home")
        refused = bouquet(*words, str(tmp_path / "a"), cwd=home)
        assert f"cannot listen on --host 127.0.0.1 --port {port}" in refused.stderr
    (tmp_path / "b" / "client").mkdir(parents=True)
    refused = bouquet(*words, str(tmp_path / "b"), cwd=home)
    assert "holds 'client'" in refused.stderr
