import fullres


def test_imports():
    assert fullres.__doc__
