#!/usr/bin/env bash
# The tests, in the environment that is active or else in uv's:  ./test.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")"
if python -c "import nested_learning, pytest" 2>/dev/null; then
    exec python -m pytest tests/ -v "$@"
fi
exec uv run pytest tests/ -v "$@"
