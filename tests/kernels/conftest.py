import warnings

import pytest

from pruneofa import _native
from tests.kernels.cases import TABLE


@pytest.fixture(scope="session", params=TABLE)
def isa(request: pytest.FixtureRequest) -> str:
    """Every path of the dispatch table; one that this machine cannot run is skipped and named among the warnings."""
    available = _native.available_isas()
    if request.param not in available:
        reason = f"NOT TESTED: kernels for {request.param}; this CPU and operating system have {', '.join(available)}"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    return request.param
