"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY: Final = datetime.timedelta(days=1)


class Pair(NamedTuple):
    """Paths of a certificate and of its key."""

    certificate: str
    key: str

    @property
    def query(self) -> str:
        return f"cert={self.certificate}&key={self.key}"


class Authority:
    """A CA whose files lie in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        self._certificate = self._build(self._name, self._key, self._name, self._key, ca=True)
        self.path = str(directory / f"{name}.pem")
        Path(self.path).write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def sign(
        self, name: str, *, file: str = "", expired: bool = False, by_itself: bool = False, host: str = "127.0.0.1"
    ) -> Pair:
        """Make a certificate for a name, and for a host; ``by_itself``: it is not this authority that signs it."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, signer = (_named(name), key) if by_itself else (self._name, self._key)
        made = self._build(_named(name), key, issuer, signer, expired=expired, host=host)
        pair = Pair(str(self._directory / f"{file or name}.pem"), str(self._directory / f"{file or name}.key"))
        Path(pair.certificate).write_bytes(made.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        Path(pair.key).touch(mode=0o600)
        Path(pair.key).write_bytes(private)
        return pair

    def _build(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Name,
        signer: ec.EllipticCurvePrivateKey,
        *,
        ca: bool = False,
        expired: bool = False,
        host: str = "127.0.0.1",
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _DAY)
            .not_valid_after(now - _DAY if expired else now + _DAY)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        )
        return builder.sign(signer, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
