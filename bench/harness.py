"""What the benchmarks share."""

from __future__ import annotations

__all__ = ["machine"]


def machine() -> str:
    """One line: what ran this, and which commit."""
    from infoclip.engine.environment import collect_environment

    found = collect_environment()
    gpus = ", ".join(gpu["name"] for gpu in found["gpus"]) or "no GPU"
    commit = str(found["git_commit"] or "no commit")
    return (
        f"{found['cpu']}, {found['cpu_count']} cores, {found['threads']} threads; {gpus}; "
        f"torch {found['packages']['torch']}; commit {commit}; {found['started']}"
    )
