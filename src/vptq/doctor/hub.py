"""The Hugging Face hub: whether it answers, and whether it knows the token."""

from __future__ import annotations

from collections.abc import Iterator

from vptq.doctor.finding import Finding

TIMEOUT_SECONDS = 10


def hub() -> Iterator[Finding]:
    """Asks the hub; the libraries underneath raise whatever they raise, hence the broad excepts."""
    from huggingface_hub import HfApi, constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "problem", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        yield Finding("hub", "problem", f"no answer: {reason}", f"curl -sSI {constants.ENDPOINT}")
        return
    yield Finding("hub", "ok", f"{constants.ENDPOINT} answers")
    token = get_token()
    if not token:
        yield Finding("hub token", "optional", "none: models that ask for consent are out of reach", "hf auth login")
        return
    try:
        yield Finding("hub token", "ok", f"of {HfApi().whoami(token)['name']}")
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        yield Finding("hub token", "problem", f"not accepted: {reason}", "hf auth login")
