"""The raw rows of a run: what it trains on, from one source or several by weight, and what it holds
out."""

from math import ceil

from datasets import Dataset

from .config import DataArguments, Source
from .sources import load_rows, take_shares


def load_data(data: DataArguments) -> tuple[list[Dataset], list[Dataset] | None]:
    """(training rows, held-out rows or `None`), raw, a dataset for each source.

    Raises:
        ValueError: a source has too few rows to hold one out, or gives no row to the mixture.
    """
    sources = data.sources()
    weights = [source["weight"] for source in sources]
    whole, heldout = [], []
    for source, weight in zip(sources, weights):
        share = weight / sum(weights)
        # Held-out rows without a dataset of their own are taken from every source by its share.
        held_out = 0
        if data.eval_dataset_name is None:
            held_out = ceil(share * data.eval_rows)
        rows = _load_source(source, share, held_out, data)
        if held_out:
            # The last rows, because max_train_rows takes the first. At most a tenth, because
            # training needs most of a small source.
            size = min(held_out, max(len(rows) // 10, 1))
            first = _start_of_conversation(rows, len(rows) - size)
            heldout.append(rows.select(range(first, len(rows))))
            rows = rows.select(range(first))
        whole.append(rows)
    train = take_shares(whole, weights, data.max_train_rows)
    if len(sources) > 1:
        _check_mixture(sources, whole, train)
        counts = [f"{len(rows)} rows of {source['name']}" for rows, source in zip(train, sources)]
        print(f"mixture: {', '.join(counts)}")
    if data.eval_dataset_name is not None:
        heldout = [_load_heldout(data)]
    return train, heldout or None


def _start_of_conversation(rows: Dataset, first: int) -> int:
    """The first row of the conversation that a row belongs to. `regenerate` writes several rows of
    one conversation, and training on some of them would tell what the others hold."""
    if "source_row" not in rows.column_names:
        return first
    sources = rows["source_row"]
    start = first
    while start > 0 and sources[start - 1] == sources[first]:
        start -= 1
    # All rows may be of one conversation, and something must be left to train on.
    return start or first


def _load_source(source: Source, share: float, held_out: int, data: DataArguments) -> Dataset:
    """All rows of a source, or where they are streamed as many as its share asks for."""
    # A stream is read from its start. Its last rows are then held out.
    stream_rows = None
    if data.dataset_streaming:
        stream_rows = ceil(share * data.max_train_rows) + held_out
    # What errors call the source's keys.
    keys = "dataset_" if data.dataset_mixture is None else "dataset_mixture's "
    rows = load_rows(
        source["name"],
        source["config"],
        source["split"],
        source["revision"],
        stream_rows=stream_rows,
        keys=keys,
        salvage=data.dataset_salvage,
    )
    if held_out and len(rows) < 2:
        raise ValueError(
            f"{source['name']} has {len(rows)} rows, too few to hold one out: give more, or"
            " eval_dataset_name"
        )
    return rows


def _check_mixture(sources: list[Source], whole: list[Dataset], train: list[Dataset]) -> None:
    for source, rows, taken in zip(sources, whole, train):
        if not len(taken):
            raise ValueError(
                f"dataset_mixture: of {source['name']} ({len(rows)} rows, weight"
                f" {source['weight']:g}) not one row would be taken: raise its weight or"
                " max_train_rows, or leave it out"
            )


def _load_heldout(data: DataArguments) -> Dataset:
    """The first `eval_rows` rows of the held-out dataset."""
    rows = load_rows(
        data.eval_dataset_name,
        data.eval_dataset_config,
        data.eval_dataset_split,
        data.eval_dataset_revision,
        stream_rows=data.eval_rows if data.dataset_streaming else None,
        keys="eval_dataset_",
        salvage=data.dataset_salvage,
    )
    return rows.select(range(min(data.eval_rows, len(rows))))
