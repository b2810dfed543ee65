"""Which kind of store an address needs."""

import os
from collections.abc import Sequence

from bmfm_pipeline.data.stores.base import BaseStore
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import is_remote, local_path, localise, strip_userinfo

Address = str | os.PathLike


def open_store(
    address: Address | Sequence[Address], genes: Sequence[str] | None = None, *, unique_names: bool = False
) -> BaseStore:
    """The cells at `address`: an h5ad file, a zarr folder, each local or on s3://, or a list of such as one.

    An h5ad on s3 is read from a copy in the local cache, a zarr store where it lies. With a list, or `genes`, genes are aligned by
    name; see JoinedStore. Of many h5ad files only some are open at a time. Raises DataError or StorageError.
    """
    if isinstance(address, str | os.PathLike):
        store = _open_one(address)
        if genes is None:
            return store
        stores = [store]
    else:
        from bmfm_pipeline.data.stores.on_demand import MOST_OPEN

        stores = [_open_one(one, on_demand=len(address) > MOST_OPEN) for one in address]
    from bmfm_pipeline.data.stores.joined import JoinedStore

    return JoinedStore(stores, genes, unique_names=unique_names)


def _open_one(address: Address, on_demand: bool = False) -> BaseStore:
    text = str(address).rstrip("/")
    if text.endswith(".zarr") or (not is_remote(text) and local_path(text).is_dir()):
        from bmfm_pipeline.data.stores.zarr_group import ZarrStore

        return ZarrStore(text)
    if not text.endswith(".h5ad"):
        raise DataError(f"{strip_userinfo(text)}: neither an .h5ad file nor a .zarr folder; these two can be opened")
    if on_demand:
        from bmfm_pipeline.data.stores.on_demand import OnDemandStore

        return OnDemandStore(localise(text))
    from bmfm_pipeline.data.stores.h5ad import CellStore

    return CellStore(localise(text))
