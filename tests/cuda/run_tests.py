"""Runs the functions of a program whose names begin with test_: for tests of CUDA's scripts."""


def run_tests(functions, argument):
    """functions: the program's globals(). Calls each test with argument and prints "N tests, M
    failed". Returns the exit status."""
    failed = ran = 0
    for name, test in list(functions.items()):
        if not name.startswith("test_"):
            continue
        ran += 1
        try:
            test(argument)
        except AssertionError as e:
            failed += 1
            print(f"FAIL {name}: {e}")
    print(f"{ran} tests, {failed} failed")
    return 1 if failed or not ran else 0
