"""The tests' server as a process: `python bench/_api_server.py --rate 50` prints {"url": ..., "port": ...} and serves.

Refuses to be reached from elsewhere. GET /stats on its port tells what it received and answered.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.servers.api import main

if __name__ == "__main__":
    main()
