"""Tasks on other processes: those of any executor, or the workers of a Dask cluster by its scheduler's address.

Workers must have this package, and see models and outputs under the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, as_completed
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from moesurgery.errors import OutputError, RecipeError, SurgeryError

MakeExecutor = Callable[[], AbstractContextManager[Executor]]
_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")

_CONNECT = 60  # seconds that a scheduler may take to answer, or to come back
_RETRIES = 3  # how often the cluster tries a task elsewhere whose worker died
_FRUITLESS = 3  # rounds in which no task was done


def results_of(
    make_executor: MakeExecutor,
    function: Callable[..., _Result],
    tasks: Mapping[_Key, tuple[Any, ...]],
    what: str,
) -> Iterator[tuple[_Key, _Result]]:
    """Yield (key, result) of `function(*arguments)` for each task, as they are done.

    What is lost with its worker, or with the scheduler, is sent again to a new executor. What a task itself raises as
    SurgeryError ends all. Raises OutputError, which names `what`, where nothing gets done any more.
    """
    left = dict(tasks)
    fruitless = 0
    while left:
        before = len(left)
        lost: BaseException | None = None
        with make_executor() as pool:
            futures = {pool.submit(function, *arguments): key for key, arguments in left.items()}
            try:
                for future in as_completed(futures):
                    try:
                        result = future.result()
                    except SurgeryError:
                        raise
                    except (Exception, CancelledError) as error:  # of whichever engine it is
                        lost = error
                        continue
                    del left[futures[future]]
                    yield futures[future], result
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        fruitless = 0 if len(left) < before else fruitless + 1
        if fruitless == _FRUITLESS:
            raise OutputError(
                f"workers die while {what}: {type(lost).__name__}: {lost}",
                "run the same command again to resume; the workers' own logs say why",
            )


@dataclass(frozen=True)
class Scheduler:
    """Where tasks are sent: `tcp://host:8786`, or `local:8` for eight processes of this machine, started here."""

    address: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"local:[1-9]\d{0,3}|(tcp|tls|ucx|ws|wss)://\S+", self.address):
            raise RecipeError(
                f"--scheduler {self.address} is no address of a scheduler",
                "type tcp://HOST:8786 as `dask scheduler` prints it, or local:8 for 8 processes here",
            )

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        """Connect, and give what tasks are submitted to. Raises SurgeryError where there is no scheduler or no Dask."""
        try:
            distributed: Any = import_module("distributed")  # its functions have no types
        except ImportError:
            raise SurgeryError(
                "--scheduler needs Dask, which is not installed", "pip install 'moesurgery[dask]'"
            ) from None
        cluster = None
        if self.address.startswith("local:"):
            workers = int(self.address.removeprefix("local:"))
            cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50
            )
        try:
            try:
                client = distributed.Client(cluster or self.address, timeout=_CONNECT, set_as_default=False)
            except (OSError, ValueError) as error:
                raise SurgeryError(
                    f"no scheduler answers at {self.address}: {error}",
                    "start one: `dask scheduler`, `dask worker ADDRESS`",
                ) from None
            try:
                yield _ClusterExecutor(client)
            finally:
                with suppress(OSError, TimeoutError):
                    client.close(timeout=5)
        finally:
            if cluster is not None:
                cluster.close(timeout=10)


class _ClusterExecutor(Executor):
    """Tasks on the workers of a Dask client, whose own executor never ends where results went with the scheduler."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, function: Callable[..., _Result], /, *arguments: Any, **more: Any) -> Future[_Result]:
        given: Future[_Result] = Future()
        given.set_running_or_notify_cancel()  # those that are left are dropped when the client is closed

        def pass_on(task: Any) -> None:
            try:
                result = task.result(timeout=_CONNECT)
            except BaseException as error:
                given.set_exception(error)
            else:
                given.set_result(result)

        task = self._client.submit(function, *arguments, **more, retries=_RETRIES, pure=False)
        task.add_done_callback(pass_on)
        return given
