"""Code that runs on the device: everything here is compiled by Triton and imported only when it is asked for."""
