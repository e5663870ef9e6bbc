"""What keeps the event loop prompt, asked of this interpreter."""

import subprocess
import sys


def test_what_a_start_made_is_not_looked_at_again() -> None:
    program = (
        "import gc; from server.promptness import forget_the_start; forget_the_start();"
        "print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000)"
    )

    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

    assert found.stdout.split() == [b"True", b"True"]
