"""Where profiles are kept: one profile.json per key, under the state directory."""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from maestro_core.profile import Profile, ProfileError, ProfileKey
from maestro_core.writing import write_atomically


class StoreError(OSError):
    """The state directory can't be written; serving goes on without it."""


class Found(NamedTuple):
    """A stored profile, or why there is none to use (None when none was ever stored)."""

    profile: Profile | None
    reason: str | None


class ProfileStore:
    """Profiles under `state_dir`/profiles/DIGEST/profile.json."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "profiles"

    def path(self, key: ProfileKey) -> Path:
        """Return where the profile of a key is kept."""
        return self._root / key.digest() / "profile.json"

    def find(self, key: ProfileKey, points: int | None = None) -> Found:
        """Return the stored profile of exactly this key, and of so many points if that is said.

        A file that is no profile, or one of another artifact, host, provider, threads or runtime,
        is renamed to `profile.json.unusable` and the reason returned: the caller calibrates again.
        """
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Found(None, None)
        except OSError as error:
            return Found(None, f"{path}: can't be read: {error.strerror}")
        except UnicodeDecodeError:
            return _set_aside(path, "not UTF-8")
        try:
            profile = Profile.from_json(text)
        except ProfileError as error:
            return _set_aside(path, str(error))
        if profile.key != key:
            return _set_aside(path, f"made for another {_difference(profile.key, key)}")
        if points not in (None, len(profile.points)):
            return _set_aside(path, f"of {len(profile.points)} points, where there are {points}")
        return Found(profile, None)

    def save(self, profile: Profile) -> Path:
        """Write a profile, whole or not at all, and return its path.

        Raises:
            StoreError: no permission, no space, or no directory.
        """
        path = self.path(profile.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, profile.to_json().encode())
        except OSError as error:
            raise StoreError(error.errno, f"profile not stored: {error.strerror}", str(path)) from (
                error
            )
        return path


def _set_aside(path: Path, reason: str) -> Found:
    aside = path.with_name(path.name + ".unusable")
    try:
        path.replace(aside)
    except OSError as error:
        return Found(None, f"{path}: {reason}; it can't be set aside: {error.strerror}")
    return Found(None, f"{path}: {reason}; set aside as {aside.name}")


def _difference(found: ProfileKey, wanted: ProfileKey) -> str:
    names = (field.name for field in fields(ProfileKey))
    return ", ".join(name for name in names if getattr(found, name) != getattr(wanted, name))
