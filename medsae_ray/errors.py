"""The one exception a user causes: shown as a single sentence, exit code 2, no traceback."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, where (file, row, key), what to do about it.
    It never names a patient: a row is named by its `image_id`, a table by its path and row number.
    """
