"""KeptStates: what a trainer reads its rows' states from, once it has filled it."""

from pathlib import Path

import torch
from datasets import Dataset

from ..target import FrozenTarget
from ..training.config import AUFConfig
from ..training.waiting import wait_for_everyone
from .filling import alone_in, fill
from .settings import dtype_name, open_folder, others_in, settings_of
from .store import StateStore
from .wanted import check_room, rows_of, size_in_words


class KeptStates:
    """The target's states of the rows of a run, computed once and then read from disk.

    Args:
        target (`FrozenTarget`): not sharded yet.
        args (`AUFConfig`): where, how much, in which dtype, and how many processes share the work.
    """

    def __init__(self, target: FrozenTarget, args: AUFConfig):
        self.target, self.args = target, args
        self.folder = Path(args.target_states_cache).expanduser()
        self._settings = target.states_settings or settings_of(target)
        self._store: StateStore | None = None  # the states' dtype is known after a pass
        self._filled: list[Dataset] = []

    @classmethod
    def of(cls, target: FrozenTarget, args: AUFConfig) -> "KeptStates | None":
        """Those of a run, where its arguments ask for them."""
        return None if args.target_states_cache is None else cls(target, args)

    def fill(self, *given: Dataset | dict[str, Dataset] | None) -> None:
        """Compute the states of all rows that the folder lacks. All processes call it.

        Args:
            given (`Dataset` or `dict[str, Dataset]`, *optional*): token rows, or several sets of
                them. Those that were filled before are left out.

        Raises:
            ValueError: the folder is something else; there is more to keep than
                `target_states_cache_gb` allows, or than the disk has room for.
            OSError: the disk is full after all. Rows that are whole stay.
            KeyboardInterrupt: Ctrl-C or SIGTERM came. Rows that are whole stay.
        """
        sets = []
        for one in given:
            sets += one.values() if isinstance(one, dict) else [one]
        done = [None, *self._filled]
        sets = [rows for rows in sets if not any(rows is other for other in done)]
        if not sets:
            return
        args, store = self.args, self._open(sets)
        rows = rows_of(sets)
        missing = [row for row in rows if row.key not in store]
        is_first = args.process_index == 0
        if is_first:
            print(size_in_words(rows, missing, store, self.folder))
            if len(missing) == len(rows) and (others := others_in(store.folder)):
                print(f"  of other targets, taps or dtypes it holds: {', '.join(others)}")
        check_room(rows, missing, store, args.target_states_cache_gb)
        # One process locks for all of this run, because two runs would compute the same rows.
        with alone_in(store.folder, wanted=is_first and bool(missing)):
            wait_for_everyone()
            store.refresh()  # another run may have been at work meanwhile
            missing = [row for row in rows if row.key not in store]
            fill(self.target, store, missing, args)
            # Nobody reads before all have written.
            wait_for_everyone()
        store.refresh()
        lacking = sum(row.key not in store for row in rows)
        if lacking:
            raise ValueError(
                f"the states of {lacking} rows, which another process has computed, are not in"
                f" {self.folder}: target_states_cache must be a folder that all machines share"
            )
        self._filled += sets

    def context(self, keys: list[str], input_ids: torch.Tensor) -> torch.Tensor:
        """What [`FrozenTarget.context`] gives, with zeros on padding, which nobody sees.

        Args:
            keys (`list[str]`): B keys of `data.rows.row_key`.
            input_ids (`torch.LongTensor` of shape `(B, S)`).

        Returns:
            (B, S, L * H)
        """
        store, device = self._store, input_ids.device
        context = torch.zeros(
            *input_ids.shape,
            store.width,
            dtype=store.dtype,
            # From pinned memory a GPU fetches it while the CPU goes on.
            pin_memory=device.type == "cuda",
        )
        for row, key in zip(context, keys):
            states = store.read(key)  # (S of the row, L * H)
            row[: len(states)] = states
        return context.to(device, non_blocking=True)

    def _open(self, sets: list[Dataset]) -> StateStore:
        """The files of these states, as they are now."""
        if self._store is not None:
            self._store.refresh()
            return self._store
        # Only a pass tells the dtype: that of a quantised target's weights says nothing.
        ids = torch.tensor([sets[0][0]["input_ids"][:2]], device=self.args.device)
        context = self.target.context(ids)
        dtype = context.dtype
        if self.args.target_states_cache_dtype != "auto":
            dtype = getattr(torch, self.args.target_states_cache_dtype)
            self._say_what_rounding_does(context.dtype)
        settings = self._settings | {"dtype": dtype_name(dtype)}
        name = self.target.model.config._name_or_path
        part = open_folder(self.folder, settings, called=name)
        self._store = StateStore(part, context.shape[-1], dtype)
        return self._store

    def _say_what_rounding_does(self, own: torch.dtype) -> None:
        if own == torch.bfloat16 or self.args.bf16 or self.args.process_index:
            # The drafter's first product rounds to bf16 under autocast, whatever it is given.
            return
        print(
            f"target_states_cache_dtype: bfloat16 rounds this target's {dtype_name(own)} states, so"
            " that the loss differs a little from the one without target_states_cache"
        )
