"""What else opens a checkpoint of each host: tried, not tried, or known to be impossible.

`docs/loaders.md` says what was run and what happened.
"""

LOADERS = ("transformers", "lm-evaluation-harness", "llama.cpp", "vLLM", "SGLang")

TESTED = "tested, at the end of every conversion (logits where it fits memory)"
UNKNOWN_ARCHITECTURE = "cannot: it knows no such architecture"

TRIED: dict[str, dict[str, str]] = {
    "mixtral": {
        "transformers": TESTED,
        "lm-evaluation-harness": "tested",
        "llama.cpp": "its converter was tested",
    },
    "custom": {
        "transformers": "tested, with trust_remote_code=True",
        "llama.cpp": UNKNOWN_ARCHITECTURE,
        "vLLM": UNKNOWN_ARCHITECTURE,
        "SGLang": UNKNOWN_ARCHITECTURE,
    },
}


def loaders(host: str) -> dict[str, str]:
    """Loader -> what is known of it with the checkpoints of this host."""
    known = {"transformers": TESTED, **TRIED.get(host, {})}
    return {name: known.get(name, "untested") for name in LOADERS}
