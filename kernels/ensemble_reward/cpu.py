"""placeholder until the native library lands"""
def available(): return False
