"""Tab completion of `python -m pipeline...` in bash and zsh: tools, flags, settings, their values.

`main` prints a shell function; the function asks `candidates` with the line as typed so far. A
setting is completed section by section, then a value where only some are allowed.
"""

import shlex
from collections.abc import Iterable

from pipeline import artifacts, compose, refusals
from pipeline.errors import PipelineError

STAGES = ("config", *artifacts.STAGES)

BASH = r"""_sparse_distillation() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=()
    [[ $line == *\ -m\ pipeline* ]] || return 0
    COMPREPLY=($("$1" -m pipeline completion bash --line "$line" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace 2>/dev/null
    local word="${line##*[[:space:]]}"
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
    fi
}
complete -o bashdefault -o default -F _sparse_distillation python python3
"""

ZSH = r"""_sparse_distillation() {
    if [[ $LBUFFER != *' -m pipeline'* ]]; then
        _default
        return
    fi
    local -a found
    found=(${(f)"$($words[1] -m pipeline completion zsh --line "$LBUFFER" 2>/dev/null)"})
    if (( $#found == 0 )); then
        _default
    elif [[ $found[1] == *[.=] ]]; then
        compadd -Q -S '' -- $found
    else
        compadd -Q -- $found
    fi
}
compdef _sparse_distillation python python3
"""


def main(shell: str, line: str | None) -> None:
    """Print the function for a shell, or what completes a line, one candidate a line."""
    if line is None:
        print({"bash": BASH, "zsh": ZSH}[shell], end="")
    else:
        print("".join(f"{found}\n" for found in candidates(line)), end="")


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become; nothing where it is a file or free text."""
    words = _words(line)
    if "-m" not in words[:-1]:
        return []
    module, *rest = words[words.index("-m") + 1 :]
    if not rest:
        return _starting(module, ["pipeline", *(f"pipeline.stages.{name}" for name in STAGES)])
    *before, word = rest
    if module == "pipeline":
        return _of_tool(before, word)
    if module.removeprefix("pipeline.stages.") not in STAGES:
        return []
    if before and before[-1] == "--layer":
        return _starting(word, _layers())
    return _starting(word, ["--help", *["--layer"] * module.endswith(".train")]) or _setting(word)


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # an open quotation mark
        words = line.split()
    return [*words, ""] if line[-1:].isspace() or not words else words


def _of_tool(before: list[str], word: str) -> list[str]:
    from pipeline.__main__ import TOOLS

    if not before:
        return _starting(word, [*TOOLS, "--help", "--version"])
    if before[0] not in TOOLS:
        return []
    arguments = TOOLS[before[0]].arguments
    flags = [name for name in arguments if name.startswith("--")] + ["--help"]
    if word.startswith("-"):
        return _starting(word, flags)
    if "overrides" in arguments:
        return _setting(word)
    fixed = [str(choice) for how in arguments.values() for choice in how.get("choices", ())]
    return _starting(word, fixed)


def _setting(word: str) -> list[str]:
    groups = refusals.groups(compose.CONF)
    key, equals, value = word.partition("=")
    if not equals:
        keys = [*refusals.kinds(), *groups]
        return sorted({_next_part(k, word) for k in keys if k.startswith(word)})
    if key in groups:
        known = groups[key]
    else:
        known = refusals.choices(key) if key in refusals.kinds() else []
    return [f"{key}={found}" for found in _starting(value, known)]


def _next_part(key: str, word: str) -> str:
    """`key` up to the next point behind `word`, or all of it and `=`."""
    end = key.find(".", len(word))
    return f"{key}=" if end < 0 else key[: end + 1]


def _starting(word: str, known: Iterable[str]) -> list[str]:
    return [name for name in known if name.startswith(word)]


def _layers() -> list[str]:
    try:
        return [str(k) for k in compose.load([]).model.layers]
    except PipelineError:
        return []
