"""Servers of storage engines that let nobody in who does not show who he is, and that prove by TLS who they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import grpc
from aetcd.rpc import Permission, rpc_pb2, rpc_pb2_grpc
from certificates import Authority, Pair

from bench.databases import Etcd, Mariadb, Postgres, Server

USER: Final = "bpfuse"
#: The user's password; nobody may see it.
PASSWORD: Final = r"pass'word \of (many) $kinds of %41 characters"
_SYSTEM_TABLES: Final = ("mysql_system_tables.sql", "mysql_system_tables_data.sql")


class Secured(Server):
    """What is the same for all. ``certificate`` is the server's own."""

    authority: Authority
    certificate: Pair

    def secure(self, authority: Authority) -> None:
        """Make what the server shows, and what clients do; to be called before anything is set up."""
        self.authority = authority
        self.certificate = self.signed_by(authority)
        self.password_file = self.secret("password", PASSWORD)

    def signed_by(self, authority: Authority, host: str = "127.0.0.1") -> Pair:
        """Return a certificate of the server's."""
        return authority.sign(self.name, file=f"{self.name}-{host}", host=host)

    def secret(self, name: str, text: str) -> Path:
        """Return a new file that nobody else can read."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(f"{text}\n")
        return path

    def certified_url(self, authority: Authority | None = None) -> str:
        """Return a URL without a password."""
        raise NotImplementedError

    def url(self, port: int | None = None) -> str:
        return f"{self.certified_url()}&password_file={self.password_file}"


class CertificateEtcd(Secured, Etcd):
    """An etcd on https that asks for clients' certificates, not for passwords."""

    scheme = "https"

    def __init__(self, authority: Authority) -> None:
        super().__init__()
        self.secure(authority)
        self._client = authority.sign("etcd-client")

    def command(self) -> list[str]:
        return [
            *super().command(), f"--cert-file={self.certificate.certificate}", f"--key-file={self.certificate.key}",
            "--client-cert-auth", f"--trusted-ca-file={self.authority.path}",
        ]  # fmt: skip

    def certified_url(self, authority: Authority | None = None) -> str:
        return f"{Etcd.url(self)}?ca={(authority or self.authority).path}"

    def url(self, port: int | None = None) -> str:
        return f"{self.certified_url()}&{self._client.query}"


class PasswordEtcd(Secured, Etcd):
    """An etcd on https whose user may use the tests' keys, and no others."""

    scheme = "https"

    def __init__(self, authority: Authority) -> None:
        super().__init__()
        self.secure(authority)
        self._knows_users = False

    def command(self) -> list[str]:
        own = self.certificate
        return [*super().command(), f"--cert-file={own.certificate}", f"--key-file={own.key}"]

    def start(self) -> None:
        super().start()
        if not self._knows_users:
            self._make_users()
            self._knows_users = True

    def _make_users(self) -> None:
        credentials = grpc.ssl_channel_credentials(Path(self.authority.path).read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{self.port}", credentials) as channel:
            stub = rpc_pb2_grpc.AuthStub(channel)
            tests = Permission(permType=Permission.READWRITE, key=b"test/", range_end=b"test0")
            for user, role in (("root", "root"), (USER, "tests")):
                stub.UserAdd(rpc_pb2.AuthUserAddRequest(name=user, password=PASSWORD), wait_for_ready=True)
                stub.RoleAdd(rpc_pb2.AuthRoleAddRequest(name=role))
                stub.UserGrantRole(rpc_pb2.AuthUserGrantRoleRequest(user=user, role=role))
            stub.RoleGrantPermission(rpc_pb2.AuthRoleGrantPermissionRequest(name="tests", perm=tests))
            stub.AuthEnable(rpc_pb2.AuthEnableRequest())

    def certified_url(self, authority: Authority | None = None) -> str:
        return f"{Etcd.url(self).replace('//', f'//{USER}@')}?ca={(authority or self.authority).path}"


class SecuredPostgres(Secured, Postgres):
    """A PostgreSQL that takes SCRAM passwords, over TLS only."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        super().__init__()

    def prepare(self) -> None:
        self.secure(self._authority)
        for name, path in (("tls.pem", self.certificate.certificate), ("tls.key", self.certificate.key)):
            self._give(Path(shutil.copy(path, self.directory / name)))
        initial = self.secret("initial", PASSWORD)
        self._give(initial)
        self.access = ("--auth=scram-sha-256", f"--pwfile={initial}")

    def _give(self, path: Path) -> None:
        """Have a file be the server's."""
        path.chmod(0o600)
        if self.runs_as:
            shutil.chown(path, self.runs_as)

    def command(self) -> list[str]:
        hba = self.directory / "hba"
        hba.write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        return [
            *super().command(), "-c", "ssl=on", "-c", f"ssl_cert_file={self.directory}/tls.pem",
            "-c", f"ssl_key_file={self.directory}/tls.key", "-c", f"hba_file={hba}",
        ]  # fmt: skip

    def certified_url(self, authority: Authority | None = None) -> str:
        return f"{Postgres.url(self)}&ca={(authority or self.authority).path}"


class SecuredMariadb(Secured, Mariadb):
    """A MariaDB with accounts, of which one may come over TLS only."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        super().__init__()

    def prepare(self) -> None:
        self.secure(self._authority)
        tables = b"\n".join((Path("/usr/share/mysql") / name).read_bytes() for name in _SYSTEM_TABLES)
        password = PASSWORD.replace("\\", "\\\\").replace("'", "''")
        account = f"'{USER}'@'127.0.0.1'"
        grant = f"CREATE USER {account} IDENTIFIED BY '{password}' REQUIRE SSL;\nGRANT ALL ON test.* TO {account};\n"
        self.accounts = b"CREATE DATABASE mysql;\nUSE mysql;\n%b\nFLUSH PRIVILEGES;\n%b" % (tables, grant.encode())
        own = self.certificate
        self.access = (f"--ssl-cert={own.certificate}", f"--ssl-key={own.key}")

    def certified_url(self, authority: Authority | None = None) -> str:
        return f"{Mariadb.url(self).replace('root@', f'{USER}@')}&ca={(authority or self.authority).path}"


SECURED: Final = {
    "etcd with certificates": CertificateEtcd,
    "etcd with passwords": PasswordEtcd,
    "postgresql": SecuredPostgres,
    "mysql": SecuredMariadb,
}
