"""The page about published models in one graph, from the record that tests/test_upstream_gpu.py writes."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

HEADERS = ("model", "graphs", "nodes", "rewritten by scope: frame", "dense = shims", "eager unchanged")


def page(record: dict[str, Any]) -> str:
    """Markdown: what is compared, where it ran, a row for each model, notes by hand."""
    setting = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    return "\n".join(
        [
            "# Published models in one graph\n",
            "Small instances of the unmodified published classes, compiled with Inductor on a GPU. `dense = shims`",
            "compares the plan `dense`, without `outline`, bit for bit with the same shims and no rewriting, `eager",
            "unchanged` an eager call before all compiles with one after. `nodes` are those of the graph that holds",
            "the attentions. The checks are those of `tests/test_upstream_gpu.py`; it writes this page with",
            "`VGGT_COMPILE_RECORD=DIR`.\n",
            f"{setting}.\n",
            tabulate(map(_cells, record["rows"]), HEADERS, tablefmt="github"),
            *(f"\n{note}" for note in record.get("notes", ())),
            "",
        ]
    )


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    done = f"{row['rewritten']} of {row['attentions']}"
    same, kept = ("yes" if row[key] else "no" for key in ("dense_equals_shims_only", "eager_unchanged"))
    return row["model"], row["graphs"], row["nodes"], done, same, kept
