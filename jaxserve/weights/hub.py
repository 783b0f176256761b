"""Hub ids: the files that serving needs, into the hub's own cache.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub, which
also draws the progress bars.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from jaxserve.weights.checkpoint import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_SMALL = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
_WEIGHTS = "*.safetensors"
# Other copies of the weights: sub-folders of the original release, one file of all the shards.
_UNWANTED = ("*/*", "consolidated*")


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def download(repo: str, revision: str | None = None, check: Callable[[Path], None] | None = None) -> Path:
    """The directory of a hub model, complete.

    `check` is called with the directory when all but the weights is there, which may be hundreds of GB;
    what it raises goes on to the caller. Not where weights of that revision are there already.

    Raises: CheckpointError when it is missing, private, gated, not reachable, or has no weights
    that can be read; the message says what to do.
    """
    if check is not None:
        path = _fetch(repo, revision, _SMALL)
        if (path / "config.json").is_file() and not any(path.glob(_WEIGHTS)):
            check(path)
    path = _fetch(repo, revision, (*_SMALL, _WEIGHTS))
    if not any(path.glob(_WEIGHTS)):
        raise CheckpointError(f"{repo}: has no safetensors files; for GGUF download the file and name it")
    return path


def _fetch(repo: str, revision: str | None, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download

    # The package reads the variable once, when it is imported; a test or a program may set it later.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint,
            allow_patterns=list(wanted),
            ignore_patterns=list(_UNWANTED),
        )
    except Exception as error:
        # HTTP, offline, file-system and library errors share no base class.
        raise CheckpointError(_explain(error, repo, revision, endpoint)) from error
    return Path(folder)


def _explain(error: BaseException, repo: str, revision: str | None, endpoint: str) -> str:
    from huggingface_hub import errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def status() -> int | None:
        responses = [getattr(e, "response", None) for e in chain if isinstance(e, errors.HfHubHTTPError)]
        return next((r.status_code for r in responses if r is not None), None)

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    given = "the token in use has no access" if _has_token() else "no token is set"
    if has(errors.GatedRepoError):
        return (
            f"{repo}: gated at {endpoint}; accept its terms on its page there and set HF_TOKEN to a token "
            f"of the same account with read access to {repo} ({given})"
        )
    if has(errors.RevisionNotFoundError):
        return f"{repo}: has no revision {revision!r} at {endpoint}"
    if has(errors.RepositoryNotFoundError):
        return (
            f"{repo}: not a local path, and at {endpoint} it does not exist or is private; for a private "
            f"model set HF_TOKEN to a token with read access to {repo} ({given})"
        )
    code = status()
    if code in (401, 403):
        return (
            f"{repo}: {endpoint} answered {code}; set HF_TOKEN to a valid token with read access to {repo} "
            f"({given})"
        )
    if code is not None:
        return f"{repo}: {endpoint} answered {code}; try again later, or name a local directory"
    if has(errors.OfflineModeIsEnabled) or has(errors.LocalEntryNotFoundError):
        return (
            f"{repo}: not a local path, not complete in the hub cache, and {endpoint} cannot be reached; "
            "download it where there is a network, or name a local directory"
        )
    return f"{repo}: cannot be fetched from {endpoint}: {error}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())
