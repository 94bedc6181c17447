"""The described API under requests that schemathesis makes of the description: valid ones, and ones
that are wrong in a place.
"""

import os
import subprocess
import sys

import pytest

from .test_clients import installed


@pytest.mark.slow
def test_no_described_request_is_a_server_error(address):
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance"
    options = (
        f"--checks {checks} --mode all --max-examples 25 --generation-deterministic --no-color"
    )
    more = "--suppress-health-check all --request-timeout 60"
    run = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    done = subprocess.run(
        [*run, *options.split(), *more.split()],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(installed("schemathesis"))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Test cases:" in done.stdout
