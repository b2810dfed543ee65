"""ZarrStore: anndata's zarr layout, in a folder or on s3; only the chunks that hold the rows asked for are read."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.stores.base import LOG_VALUES, BaseStore
from bmfm_pipeline.data.stores.columns import index_of, read_column
from bmfm_pipeline.data.stores.matrices import Gathered, Matrix, in_order, joined, running_sizes
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import attempt, is_remote, local_path, open_zarr, strip_userinfo

DEFAULT_CACHE_BYTES = 512 << 20
_AT_ONCE = 64


class ChunkCache:
    """Decoded chunks of several arrays, at most `limit` bytes, least recently used out first. A chunk is read by one thread only."""

    def __init__(self, uri: str, limit: int):
        self.uri, self.limit, self.reads = uri, limit, 0
        self._chunks: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._coming: dict[tuple[str, int], Future] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, wanted: list[tuple[str, int, object]]) -> dict[tuple[str, int], np.ndarray]:
        """{(array, chunk): values} of the (array name, chunk number, zarr array) that are wanted."""
        found, own, others = {}, [], {}
        with self._lock:
            for name, number, array in wanted:
                key = name, number
                if key in self._chunks:
                    self._chunks.move_to_end(key)
                    found[key] = self._chunks[key]
                elif key in self._coming:
                    others[key] = self._coming[key]
                else:
                    self._coming[key] = Future()
                    own.append((key, array))
        try:
            for start in range(0, len(own), _AT_ONCE):
                found.update(self._read(own[start : start + _AT_ONCE]))
        except BaseException as error:
            with self._lock:  # other threads may wait for what will not come
                for key, _ in own:
                    if (future := self._coming.pop(key, None)) is not None:
                        future.set_exception(error)
            raise
        found.update({key: future.result() for key, future in others.items()})
        return found

    def _read(self, chunks: list[tuple[tuple[str, int], object]]) -> dict[tuple[str, int], np.ndarray]:
        """Read chunks at once, and hand them to every thread that waits for them."""
        from zarr.core.sync import sync

        async def together():
            return await asyncio.gather(*(_chunk_of(array, number) for (_, number), array in chunks))

        read = attempt(self.uri, lambda: sync(together()))
        found = {key: np.asarray(values) for (key, _), values in zip(chunks, read, strict=True)}
        for (name, number), values in found.items():
            if name.endswith("data") and len(values) > 1 and not values.any():
                # zarr gives zeros for a chunk that is not there, and a sparse matrix stores no such run of zeros.
                raise DataError(
                    f"{strip_userinfo(self.uri)}: chunk {number} of {name} is missing or empty; write the store anew"
                )
        with self._lock:
            for key, values in found.items():
                self.reads += 1
                self._chunks[key] = values
                self._bytes += values.nbytes
                self._coming.pop(key).set_result(values)
            while self._bytes > self.limit and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return found


def _chunk_of(array, number: int):
    size = array.chunks[0]
    return array.async_array.getitem(slice(number * size, min((number + 1) * size, array.shape[0])))


class ZarrMatrix(Matrix):
    """A CSR matrix in a zarr group; indptr is in memory, indices and data come chunk by chunk."""

    def __init__(self, group, name: str, cache: ChunkCache, where: str):
        node = attempt(cache.uri, lambda: group[name])
        kind = dict(node.attrs).get("encoding-type", "array")
        if kind != "csr_matrix":
            raise DataError(f"{where}: {name} is stored as {kind}, CSR is needed; write it with `adata.X.tocsr()`")
        self.where, self._prefix, self._cache = f"{where}: {name}", name, cache
        self._indices, self._data = attempt(cache.uri, lambda: (node["indices"], node["data"]))
        self.indptr = np.asarray(attempt(cache.uri, lambda: node["indptr"][:])).astype(np.int64, copy=False)
        self.shape = tuple(int(size) for size in node.attrs["shape"])
        sizes = np.diff(self.indptr)
        if len(sizes) != self.shape[0] or (sizes < 0).any() or self.indptr[-1] > self._data.shape[0]:
            raise DataError(f"{self.where}: indptr does not fit the matrix; the store is damaged, write it anew")

    @property
    def row_sizes(self) -> np.ndarray:
        return np.diff(self.indptr)

    @property
    def dtype(self) -> np.dtype:
        return self._data.dtype.newbyteorder("=")

    def _gather(self, rows: np.ndarray) -> Gathered:
        starts, ends = self.indptr[rows], self.indptr[rows + 1]
        wanted = {}
        for name, array in (("indices", self._indices), ("data", self._data)):
            size = array.chunks[0]
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                for number in range(start // size, -(-end // size) if end > start else start // size):
                    wanted[(f"{self._prefix}/{name}", number)] = array
        chunks = self._cache.get([(*key, array) for key, array in wanted.items()])
        indices = self._pieces("indices", self._indices, chunks, starts, ends)
        data = self._pieces("data", self._data, chunks, starts, ends)
        gathered = running_sizes(ends - starts), indices.astype(np.int32, copy=False), data
        return in_order(gathered, self.shape[1], self.where)

    def _pieces(self, name: str, array, chunks, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        size, pieces = array.chunks[0], []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            while start < end:
                number, offset = divmod(start, size)
                stop = min(end, (number + 1) * size)
                pieces.append(chunks[f"{self._prefix}/{name}", number][offset : offset + stop - start])
                start = stop
        return joined(pieces, array.dtype)


class ZarrStore(BaseStore):
    """Opens what anndata's `write_zarr` wrote, in a local folder or on s3://, without loading it.

    cache_bytes: the most memory that decoded chunks may take. Chunks written with few thousand values each suit random rows.
    """

    def __init__(self, uri: str | Path, cache_bytes: int = DEFAULT_CACHE_BYTES):
        self.uri = str(uri) if is_remote(uri) else str(local_path(uri))
        self.name, self.cache_bytes = strip_userinfo(self.uri), cache_bytes
        self._group = open_zarr(self.uri)
        self.cache = ChunkCache(self.uri, cache_bytes)
        if not all(attempt(self.uri, lambda: [name in self._group for name in ("X", "obs", "var")])):
            raise DataError(
                f"{self.name}: is no AnnData: it lacks X, obs or var; write it with `adata.write_zarr(...)`"
            )
        self.matrix = ZarrMatrix(self._group, "X", self.cache, self.name)
        has_counts = attempt(self.uri, lambda: "layers/counts" in self._group)
        self.counts = ZarrMatrix(self._group, "layers/counts", self.cache, self.name) if has_counts else None
        has_logs = attempt(self.uri, lambda: LOG_VALUES in self._group)
        self.log_values = ZarrMatrix(self._group, LOG_VALUES, self.cache, self.name) if has_logs else None
        self._var_names = [str(name) for name in attempt(self.uri, lambda: index_of(self._group["var"]))]

    def __reduce__(self):
        return ZarrStore, (self.uri, self.cache_bytes)

    @cached_property
    def obs_names(self) -> np.ndarray:
        return attempt(self.uri, lambda: index_of(self._group["obs"]))

    @cached_property
    def obs_columns(self) -> list[str]:
        attributes = attempt(self.uri, lambda: dict(self._group["obs"].attrs))
        return [str(name) for name in attributes.get("column-order", [])]

    @cached_property
    def obs(self):
        from anndata.io import read_elem

        return attempt(self.uri, lambda: read_elem(self._group["obs"]))

    def _read_column(self, name: str) -> np.ndarray:
        return attempt(self.uri, lambda: read_column(self._group["obs"][name]))
