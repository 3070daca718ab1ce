def read_study(*a):
    return []


def table(*a):
    return ""
