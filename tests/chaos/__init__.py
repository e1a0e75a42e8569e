"""memd under random violence: real processes, seeded faults, invariants checked all the time.

================  ==============================================================================
``harness``       conducts a run
``judge``         what must hold, and whether it did
``report``        what a run does, and what it found
``worker``        a client process with a random program that verifies every byte it gets
``vandal``        a process that breaks every rule of the protocol
``daemon``        a memd that may be killed, stopped and started again
``processes``     children that never outlive their parent, and what a process holds
``reporting``     what the conducted processes say, line by line
``probe``         asks a daemon for its stats and times the answers
``pattern``       rows that say whose they are
``hostile``       frames that nobody should send, for the fuzz tests and the vandal
``model``         what memd must answer to any frame
``judged``        a service whose every answer is compared with the model
``lying``         a client whose daemon is a script
================  ==============================================================================
"""
