"""Shared fixtures. Without a GPU the kernels run in Triton's interpreter."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported

from grpo_kernels import backends

if backends.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter patches triton.language again in every call of a device function, which takes
    # half the time of a small launch. Patch it once per launch instead.
    patch_language, patched_modules = interpreter._patch_lang, SimpleNamespace()
    patched_modules.__globals__ = {"tl": tl, "core": tl.core}
    interpreter._patch_lang = lambda fn: patch_language(patched_modules)
    interpreter.InterpretedFunction.__call__ = lambda self, *a, **k: self.rewrite()(*a, **k)

IN_PARALLEL = "PYTEST_XDIST_WORKER_COUNT" in os.environ  # pytest -n
if IN_PARALLEL:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# No deadline: the first interpreted call takes seconds. Derandomised: runs are reproducible.
settings.register_profile(
    "grpo_kernels",
    deadline=None,
    derandomize=True,
    max_examples=15,
    phases=[
        Phase.explicit,
        Phase.generate,
        Phase.shrink,
    ],  # explain takes minutes in the interpreter
    suppress_health_check=[
        HealthCheck.function_scoped_fixture
    ],  # the backend fixture spans examples
)
# Many examples, new ones in every run: for tests/test_fuzz.py.
settings.register_profile(
    "long", settings.get_profile("grpo_kernels"), derandomize=False, max_examples=1000
)
settings.load_profile("grpo_kernels")


def pytest_collection_modifyitems(items):
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = "needs a CUDA device"
    if IN_PARALLEL:
        skipped["clock"] = "compares times, which parallel test processes disturb"
    for item in items:
        for mark, reason in skipped.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=["triton", "pytorch"])
def backend(request):
    """Run the test once per backend; skip Triton where it cannot serve the test's device."""
    on_cpu = "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu"
    if request.param == "triton" and (
        not backends.HAS_TRITON or (on_cpu and not backends.INTERPRETED)
    ):
        pytest.skip("on the CPU the kernels need Triton's interpreter, which a GPU turns off")
    with backends.use(request.param if request.param == "pytorch" else None):
        yield request.param


@pytest.fixture
def pytorch_backend():
    """Use the PyTorch backend: for tests above the kernels, which the interpreter makes slow."""
    with backends.use("pytorch"):
        yield


@pytest.fixture
def one_thread():
    """Run torch on one thread, which is up to 20 times faster for small matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def restore_backend():
    """Undo a test's call of `use`."""
    with backends.use(None):
        yield


@pytest.fixture(scope="module")
def scratch():
    """(model, tokenizer) from random weights, in fp64."""
    from reference.training.model.load import from_scratch

    torch.manual_seed(0)
    model, tokenizer = from_scratch()
    return model.double().eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Directory of a briefly trained model, so that a run from it needs no warm start."""
    from reference.training import warm_start
    from tests.helpers.training_runs import tiny

    directory = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "TARGET", 0.1)
        assert tiny(directory, "--steps", "1") == 0
    return str(directory / "model")
