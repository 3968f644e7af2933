"""Keys and certificates of a federation: one authority, the server's certificate, a key pair for each site.

A folder of them is sorted by who gets what; private keys are readable by their owner only:

* ``ca.key ca.crt``: the authority, for whoever runs the federation; the key is needed only to issue;
* ``server/``: ``ca.crt server.crt server.key``, and ``sites/NAME.pub``, the keys of the sites that may join;
* ``sites/NAME/``: ``ca.crt site.key``, to be handed to that site.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.site_names import check_site_name

CA_DAYS = 3650
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Always in the server's certificate: its own processes and operators at an SSH tunnel connect to these."""
_MAX_HOST_LENGTH = 253
_HOST = re.compile(r"(\*\.)?(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")


def make_certificates(
    folder: Path, hosts: Sequence[str], sites: Sequence[str], *, replace: Sequence[str] = (), valid_seconds: float
) -> list[Path]:
    """Make what is missing in ``folder`` and issue the server's certificate anew, from the same authority.

    Args:
        folder: Made if it does not exist.
        hosts: Names and addresses by which sites reach the server; none: those of the present certificate.
        sites: Sites that need a key pair; one that has its public key there keeps it.
        replace: Sites whose key pair is made anew.
        valid_seconds: How long the server's certificate is valid.

    Returns:
        The files written.

    Raises:
        ValueError: If there is no host to issue for or one is not a name or address, as ``check_site_name``, if the
            folder cannot be made, or the authority's key or certificate is missing, expired or unreadable.
    """
    for option, sites_named in (("--site", sites), ("--replace", replace)):
        for name in sites_named:
            check_site_name(name, option)
    names = list(hosts) or _present_hosts(folder)
    if not names:
        raise ValueError(f"--host is needed: the name or address by which sites reach the server (none in {folder})")
    subject_names = [_general_name(host) for host in dict.fromkeys((*names, *LOCAL_HOSTS))]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "server" / "sites").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {error.filename}: {error.strerror}") from error
    written = [*_make_authority(folder), *_issue_server(folder, subject_names, valid_seconds)]
    for site in dict.fromkeys((*sites, *replace)):
        if site in replace or not (folder / "server" / "sites" / f"{site}.pub").exists():
            written += _make_site_key(folder, site)
    return written


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file.

    Raises:
        ValueError: If there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a certificate in PEM format: {error}") from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is valid for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def check_server_certificate(folder: Path) -> datetime.datetime:
    """When the server's certificate ends; ``folder`` is ``server/`` of the federation's.

    Raises:
        ValueError: If a file is missing, certificate, key and authority do not belong together, or it is not valid now.
    """
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: --certificates must be DIR/server of bouquet certs DIR")
    certificate, authority = load_certificate(folder / "server.crt"), load_certificate(folder / "ca.crt")
    key = _load_key(folder / "server.key")
    if key.public_key() != certificate.public_key():
        raise ValueError(
            f"{folder / 'server.key'} is not the key of server.crt: run bouquet certs {folder.parent} again"
        )
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception as error:
        raise ValueError(
            f"{folder / 'ca.crt'} did not issue server.crt: run bouquet certs {folder.parent} again"
        ) from error
    check_valid_now(certificate, folder / "server.crt")
    check_valid_now(authority, folder / "ca.crt")
    return certificate.not_valid_after_utc


def check_valid_now(certificate: x509.Certificate, path: Path) -> None:
    """Raise ``ValueError`` if a certificate has expired or is not valid yet."""
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise ValueError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: issue it anew with "
            "bouquet certs DIR"
        )
    if now < certificate.not_valid_before_utc:
        raise ValueError(
            f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and this clock says "
            f"{now:%Y-%m-%d %H:%M}: set the clock"
        )


def public_fingerprint(path: Path) -> str:
    """``SHA256:...`` of a public key file in OpenSSH format, as ``ssh-keygen -l`` prints it.

    Raises:
        ValueError: If it is no elliptic-curve key in that format.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} is not a public key in OpenSSH format: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(_other_kind(path))  # noqa: TRY004 - a file's content, not an argument's type
    return fingerprint(key)


def check_private_key(path: Path) -> str:
    """Fingerprint of a site's private key.

    Raises:
        ValueError: If it is missing, no elliptic-curve key without passphrase, or readable by others.
    """
    if not path.is_file():
        raise ValueError(f"--key {path} is not a file: the private key that belongs to this site")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"--key {path} is not a private key in OpenSSH format without passphrase: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(_other_kind(path))  # noqa: TRY004
    # A file that is lent to us through our group (Kubernetes does so) belongs to somebody else.
    others = 0o077 if path.stat().st_uid == os.getuid() else 0o007
    if path.stat().st_mode & others:
        raise ValueError(f"--key {path} can be read by others: chmod 600 {path}")
    return fingerprint(key.public_key())


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """``SHA256:...`` of a public key, as ``ssh-keygen -l`` prints it."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _present_hosts(folder: Path) -> list[str]:
    present = folder / "server" / "server.crt"
    return hosts_of(load_certificate(present)) if present.exists() else []


def _make_authority(folder: Path) -> list[Path]:
    """``ca.key`` and ``ca.crt``, unless there are some."""
    if (folder / "ca.crt").exists() or (folder / "ca.key").exists():
        return []
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Bouquet federation")])
    signing = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), CA_DAYS * 86400)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signing, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write(folder / "ca.key", _pem(key), private=True)
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    return [folder / "ca.key", folder / "ca.crt"]


def _issue_server(folder: Path, names: Sequence[x509.GeneralName], valid_seconds: float) -> list[Path]:
    authority = load_certificate(folder / "ca.crt")
    check_valid_now(authority, folder / "ca.crt")
    authority_key = _load_key(folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), authority_key.public_key(), valid_seconds)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    target = folder / "server"
    _write(target / "server.key", _pem(key), private=True)
    _write(target / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _write(target / "ca.crt", (folder / "ca.crt").read_bytes())
    return [target / "server.key", target / "server.crt"]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    valid_seconds: float,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A site's clock may be a little slow.
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(seconds=valid_seconds))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _make_site_key(folder: Path, site: str) -> list[Path]:
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, none = serialization.Encoding, serialization.NoEncryption()
    private = key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, none)
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    own, known = folder / "sites" / site, folder / "server" / "sites" / f"{site}.pub"
    own.mkdir(parents=True, exist_ok=True)
    _write(own / "ca.crt", (folder / "ca.crt").read_bytes())
    _write(own / "site.key", private, private=True)
    _write(known, public + f" {site}\n".encode())
    return [own / "site.key", known]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > _MAX_HOST_LENGTH or not _HOST.fullmatch(host):
            raise ValueError(
                f"--host must be an address, or a name of at most {_MAX_HOST_LENGTH} letters (a-z), digits, '-' and "
                f"'.', without a port, got {host!r}"
            ) from None
        return x509.DNSName(host)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a private key in PEM format without passphrase: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(_other_kind(path))  # noqa: TRY004
    return key


def _other_kind(path: Path) -> str:
    return f"{path} must be an elliptic-curve key: bouquet certs makes it, or ssh-keygen -t ecdsa -b 384 -N '' -f FILE"


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, none = serialization.Encoding.PEM, serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, none)


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace a file at once; a private one is never readable by others, not even for a moment."""
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    scratch.rename(path)
