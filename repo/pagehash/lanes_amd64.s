#include "textflag.h"

// SHA-256 with the SHA extensions, of two messages side by side. The rounds of one message wait for each other, four cycles each; those of
// the other fill the gaps. Instructions: Intel's "Intel SHA Extensions" (2013), whose order of the state's words this keeps:
// ABEF and CDGH, from the highest.

// Lane one: X1 ABEF, X2 CDGH, X3 to X6 the message, X13. Lane two: X7 ABEF, X8 CDGH, X9 to X12 the message, X14.
// X0 is the second operand of the rounds that has no name in the instruction, X15 reverses the bytes of words.

// Four words of the message.
#define LOAD(from, m) \
	MOVOU from, m \
	PSHUFB X15, m

// Four rounds with the constants at k and four words of the schedule.
#define ROUNDS(k, m, abef, cdgh) \
	MOVOU k(AX), X0 \
	PADDD m, X0 \
	SHA256RNDS2 X0, abef, cdgh \
	PSHUFD $0x0E, X0, X0 \
	SHA256RNDS2 X0, cdgh, abef

// The next four words of the schedule, in the place of the oldest, a, of 16.
#define SCHEDULE(a, b, c, d, t) \
	MOVO d, t \
	PALIGNR $4, c, t \
	SHA256MSG1 b, a \
	PADDD t, a \
	SHA256MSG2 d, a

#define BOTH(k, one, two) \
	ROUNDS(k, one, X1, X2) \
	ROUNDS(k, two, X7, X8)

#define NEXT(k, a, b, c, d, e, f, g, h) \
	SCHEDULE(a, b, c, d, X13) \
	SCHEDULE(e, f, g, h, X14) \
	BOTH(k, a, e)

#define SIXTEEN(k) \
	NEXT(k, X3, X4, X5, X6, X9, X10, X11, X12) \
	NEXT(k+16, X4, X5, X6, X3, X10, X11, X12, X9) \
	NEXT(k+32, X5, X6, X3, X4, X11, X12, X9, X10) \
	NEXT(k+48, X6, X3, X4, X5, X12, X9, X10, X11)

#define ADD(from, x) \
	MOVOU from, X13 \
	PADDD X13, x

// func blocks(one, two *state, a, b *byte, n int)
TEXT ·blocks(SB), NOSPLIT, $0-40
	MOVQ one+0(FP), SI
	MOVQ two+8(FP), DI
	MOVQ a+16(FP), R8
	MOVQ b+24(FP), R9
	MOVQ n+32(FP), CX
	LEAQ constants<>(SB), AX
	MOVOU reverse<>(SB), X15
	MOVOU (SI), X1
	MOVOU 16(SI), X2
	MOVOU (DI), X7
	MOVOU 16(DI), X8

block:
	LOAD(0(R8), X3)
	LOAD(0(R9), X9)
	BOTH(0, X3, X9)
	LOAD(16(R8), X4)
	LOAD(16(R9), X10)
	BOTH(16, X4, X10)
	LOAD(32(R8), X5)
	LOAD(32(R9), X11)
	BOTH(32, X5, X11)
	LOAD(48(R8), X6)
	LOAD(48(R9), X12)
	BOTH(48, X6, X12)
	SIXTEEN(64)
	SIXTEEN(128)
	SIXTEEN(192)
	ADD((SI), X1)
	ADD(16(SI), X2)
	ADD((DI), X7)
	ADD(16(DI), X8)
	MOVOU X1, (SI)
	MOVOU X2, 16(SI)
	MOVOU X7, (DI)
	MOVOU X8, 16(DI)
	ADDQ $64, R8
	ADDQ $64, R9
	DECQ CX
	JNZ block
	RET

DATA reverse<>+0(SB)/8, $0x0405060700010203
DATA reverse<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL reverse<>(SB), RODATA|NOPTR, $16

// FIPS 180-4, 4.2.2.
DATA constants<>+0(SB)/8, $0x71374491428a2f98
DATA constants<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA constants<>+16(SB)/8, $0x59f111f13956c25b
DATA constants<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA constants<>+32(SB)/8, $0x12835b01d807aa98
DATA constants<>+40(SB)/8, $0x550c7dc3243185be
DATA constants<>+48(SB)/8, $0x80deb1fe72be5d74
DATA constants<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA constants<>+64(SB)/8, $0xefbe4786e49b69c1
DATA constants<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA constants<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA constants<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA constants<>+96(SB)/8, $0xa831c66d983e5152
DATA constants<>+104(SB)/8, $0xbf597fc7b00327c8
DATA constants<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA constants<>+120(SB)/8, $0x1429296706ca6351
DATA constants<>+128(SB)/8, $0x2e1b213827b70a85
DATA constants<>+136(SB)/8, $0x53380d134d2c6dfc
DATA constants<>+144(SB)/8, $0x766a0abb650a7354
DATA constants<>+152(SB)/8, $0x92722c8581c2c92e
DATA constants<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA constants<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA constants<>+176(SB)/8, $0xd6990624d192e819
DATA constants<>+184(SB)/8, $0x106aa070f40e3585
DATA constants<>+192(SB)/8, $0x1e376c0819a4c116
DATA constants<>+200(SB)/8, $0x34b0bcb52748774c
DATA constants<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA constants<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA constants<>+224(SB)/8, $0x78a5636f748f82ee
DATA constants<>+232(SB)/8, $0x8cc7020884c87814
DATA constants<>+240(SB)/8, $0xa4506ceb90befffa
DATA constants<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL constants<>(SB), RODATA|NOPTR, $256
