"""Whether the Hugging Face hub can be reached, asked briefly: its libraries try for minutes."""

from __future__ import annotations

import queue
import threading

SECONDS = 5.0
"""Time the hub has to answer."""


def check_hub(instead: str) -> None:
    """Refuse if the hub does not answer; nothing is asked where its libraries are offline (HF_HUB_OFFLINE=1).

    Args:
        instead: what a person can do without it, for the message.

    Raises:
        ConnectionError: it cannot be reached, or answers that it does not work.
    """
    from huggingface_hub import constants  # comes with `datasets`, which works with it

    if constants.HF_HUB_OFFLINE:
        return
    # The limits of a client hold for each address of a host and not for the look-up of its name.
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_ask, args=(constants.ENDPOINT, answer), daemon=True).start()
    try:
        reason = answer.get(timeout=SECONDS)
    except queue.Empty:
        reason = f"no answer in {SECONDS:g} s"
    if reason:
        raise ConnectionError(
            f"{constants.ENDPOINT} cannot be reached: {reason}; {instead}, "
            "or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        )


def _ask(endpoint: str, answer: queue.SimpleQueue[str]) -> None:
    """Put into `answer` why the hub cannot be used, or "" if it can."""
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(endpoint, timeout=SECONDS).status_code
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        answer.put(str(error) or type(error).__name__)
    else:
        answer.put(f"HTTP status {status}" if status >= 500 else "")
