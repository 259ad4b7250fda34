"""Recipients and private keys as text and in files: typing errors and open files are told."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ckpt.errors import UsageError
from ckpt.image.keys import (
    MAX_RECIPIENTS,
    PrivateKey,
    Recipient,
    distinct,
    read_private_keys,
    read_recipients,
    unwrap,
    wrap,
    write_private_key,
)
from tests.image.chain_model import KEY

OTHER = PrivateKey(bytes(range(1, 33)))


def test_the_recipient_is_the_public_key_of_x25519():
    public = X25519PrivateKey.from_private_bytes(KEY.raw).public_key()
    assert KEY.recipient.raw == public.public_bytes_raw()


def test_both_come_back_from_their_text():
    assert Recipient.parse(str(KEY.recipient)) == KEY.recipient
    assert PrivateKey.parse(str(KEY)) == KEY
    assert str(KEY.recipient).startswith("ckpt1")
    assert len(str(KEY.recipient)) == 61


def test_two_keys_are_never_the_same():
    assert PrivateKey.generate() != PrivateKey.generate()


def test_a_private_key_does_not_show_by_accident():
    assert "raw" not in repr(KEY)


def test_every_typing_error_of_one_letter_is_told():
    text = str(KEY.recipient)
    for at in range(len(text)):
        wrong = text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
        for bad in (wrong, text[:at], text[:at] + text[at + 1 :]):
            with pytest.raises(ValueError, match=r"typing error|begin with|base 32"):
                Recipient.parse(bad)


@pytest.mark.parametrize("text", ["ckpt1", "ckpt1é" + "a" * 55, "CKPT1" + "A" * 56, ""])
def test_other_texts_are_no_recipient(text):
    with pytest.raises(ValueError, match="it "):
        Recipient.parse(text)


def test_a_file_has_keys_and_is_for_its_owner_only(tmp_path):
    path = tmp_path / "key"
    write_private_key(path, KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_private_keys(path) == (KEY,)
    assert str(KEY.recipient) in path.read_text()
    with pytest.raises(UsageError, match="File exists"):
        write_private_key(path, OTHER)
    assert read_private_keys(path) == (KEY,)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others may read the private key"):
        read_private_keys(path)


def test_recipients_are_texts_or_files_of_either_sort(tmp_path):
    path = tmp_path / "recipients"
    path.write_text(f"# the team\n\n{KEY.recipient}\n  {OTHER}\n")
    assert read_recipients(str(path)) == (KEY.recipient, OTHER.recipient)
    assert read_recipients(str(KEY.recipient)) == (KEY.recipient,)


@pytest.mark.parametrize("content", ["", "# nobody\n", "ckpt1abc\n", "CKPT-PRIVATE-KEY-1ABC\n"])
def test_a_file_of_something_else_is_refused_and_not_shown(tmp_path, content):
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(0o600)
    for read in (read_recipients, read_private_keys):
        with pytest.raises(UsageError) as caught:
            read(str(path))
        assert "ABC" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_missing_file_and_a_mistyped_recipient_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_recipients(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="is no recipient"):
        read_recipients(str(KEY.recipient)[:-1])


def test_recipients_count_once_and_are_not_too_many():
    assert distinct([KEY.recipient, OTHER.recipient, KEY.recipient]) == (
        KEY.recipient,
        OTHER.recipient,
    )
    with pytest.raises(UsageError, match=f"at most {MAX_RECIPIENTS}"):
        distinct(Recipient(bytes([n]) * 32) for n in range(MAX_RECIPIENTS + 1))


def test_a_wrapped_key_opens_for_its_recipient_and_purpose_only():
    key = bytes(range(100, 132))
    wrapped = wrap(key, KEY.recipient, b"this")
    assert unwrap(wrapped, KEY, b"this") == key
    assert wrap(key, KEY.recipient, b"this") != wrapped, "never the same share"
    for private, what in ((OTHER, b"this"), (KEY, b"that")):
        with pytest.raises(ValueError, match="does not open"):
            unwrap(wrapped, private, what)


def test_a_recipient_that_nobody_can_be_is_refused():
    with pytest.raises(ValueError, match="shared key"):
        wrap(bytes(32), Recipient(bytes(32)), b"this")
