"""The operator's PEM files as TLS contexts. What cannot be used raises ValueError with key and file."""

import ssl
from collections.abc import Iterable


def workers_tls(
    authorities: Iterable[str], client_cert: str | None, client_key: str | None
) -> ssl.SSLContext:
    """How https workers are spoken to: --ca-cert-paths beside the system's, and --client-cert-path."""
    context = ssl.create_default_context()
    for path in authorities:
        _readable("ca_cert_paths", path)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise ValueError(f"ca_cert_paths={path!r} holds no PEM certificate: {_reason(error)}") from error
    if client_cert and client_key:
        load_chain(context, "client", client_cert, client_key)
    return context


def load_chain(context: ssl.SSLContext, side: str, cert: str, key: str) -> None:
    """Load certificate and key of `side`: client or tls, as their keys of the configuration begin."""
    _readable(f"{side}_cert_path", cert)
    _readable(f"{side}_key_path", key)
    try:
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        files = f"{side}_cert_path={cert!r} and {side}_key_path={key!r}"
        raise ValueError(f"{files} are no PEM certificate and its key: {_reason(error)}") from error


def _readable(name: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name}={path!r} cannot be read: {reason}") from error


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's word for it, such as KEY_VALUES_MISMATCH."""
    return error.reason or str(error)
