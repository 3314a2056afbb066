// The engine of labkit/ptx.py: runs PTX on the CPU, one warp of 32 lanes at a time. Written for what Triton emits.
//
// What a GPU leaves open is decided against the kernel: programs and warps run in random order, registers and shared
// memory begin as NaN, the target of an asynchronous copy is NaN until somebody waits for it, and approximate
// instructions are off by about what the PTX ISA allows.
// Reported, with the line of the PTX: accesses outside the arguments or misaligned, warps of a program that touch the
// same shared memory without a barrier between, writes of what a matrix product in flight may still read, programs that
// touch the same bytes without an atomic between, reads of what a program has not announced by an atomic (with a barrier
// before, where another warp stored it), instructions of a whole warp that only some lanes reach, waits for a barrier
// that nothing ends.
// Not seen: a missing fence between generic and asynchronous accesses; which atomic orders what (one of a program's
// announces all that it has stored, one of a reader's lets it read all that is announced); a result of wgmma that is
// used before its wait; a loop that polls memory for ever.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <type_traits>
#include <unordered_map>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u32 SHARED_BASE = 1024;  // as on Hopper, whose first KiB belongs to the system; ptx.py has it too

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... A>
[[noreturn]] void fault(const char* format, A... values) {
    char text[400];
    snprintf(text, sizeof text, format, values...);
    throw Fault(text);
}

// ---- what there is ---------------------------------------------------------------------------------------------------

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

// What an instruction did, summed over the warps of a launch: COUNTS in ptx.py.
struct Counts {
    s64 warps;                    // that ran it, with at least one lane
    s64 bytes, sectors;           // of global memory: asked for, and fetched, in sectors of 32 bytes
    s64 wavefronts, least;        // of shared memory: passes it took, and without bank conflicts
};

struct Instruction {
    Handler run;
    int index, name, guard, negated, line;  // guard: the row of the predicate, -1 for none
    std::vector<int> rows;           // operands: registers and constants alike are rows of 32 lanes; -1 is "_"
    std::vector<s64> numbers;        // sizes, offsets, modes: what is known when the text is read
    bool whole_warp;
};

struct Code {
    std::vector<Instruction> instructions;
    std::vector<std::string> names;
    std::vector<std::pair<int, u64>> constants;  // row, value
    std::vector<std::pair<int, int>> specials;   // row, which of SPECIALS in ptx.py
    int num_rows;
};

struct Range {  // memory that the launch may touch: the storage of one argument
    u64 begin, end;
    u32 *writer, *reader;  // of every byte: the program that touched it last, + 1; SEVERAL readers
    u32* stamp;            // of every byte: when, and which warp of its program wrote it: epoch << 8 | warp
};
constexpr u32 SEVERAL = 0xffffffffu;

// What a program has announced by atomics that release. An atomic speaks for the stores of its own warp, and for those
// of others from before the last barrier.
struct Announced {
    u32 epoch = 0;                // of the last such atomic
    std::vector<u32> by_warp{0};  // the same for each warp

    bool covers(u32 stamp) const {
        u32 at = stamp >> 8, warp = stamp & 255;
        return epoch > at || (warp < by_warp.size() && by_warp[warp] >= at);
    }
};

struct Launch {
    const Code* code;
    u32 grid[3];
    int num_threads;
    u32 shared_size;
    std::vector<u8> parameters;
    std::vector<Range> ranges;
    bool watch_races;
    Counts* counts;  // of every instruction
    u64 state;       // of the generator: xorshift64
    std::map<int, Announced> announced = {};  // of every program

    u64 random(u64 below) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state % below;
    }
};

struct Copy {  // cp.async of one lane
    u32 to, size, from_size;
    u64 from;
};

struct TmaLoad {
    u64 map;
    s64 coordinates[5];
    u32 to, barrier;
};

struct Mbarrier {
    u32 count, pending, phase;
    s64 bytes;  // announced and not yet there

    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

struct Program {
    Launch* launch;
    int id;
    u32 index[3];
    std::vector<u8> shared;
    std::vector<u32> writes, reads;  // of every byte of shared memory: epoch << 8 | warp + 1, or 255 for several
    std::vector<u16> in_flight;      // of every 16 bytes: matrix products that may still read them
    u32 epoch = 1;                   // barriers passed
    std::vector<std::unique_ptr<Warp>> warps;
    std::map<u32, Mbarrier> mbarriers;
    std::deque<TmaLoad> tma;
    bool acquired = false;  // has done an atomic: may read what other programs wrote
    int idle = 0;           // turns in which every warp only waited
};

struct Fragment {  // lanes of a warp that are at the same instruction
    int at;
    u32 lanes;
};

struct Warp {
    Program* program;
    int index;
    std::vector<u64> registers;  // [rows, 32]
    std::vector<Fragment> fragments{{0, ALL_LANES}};
    bool at_barrier = false, polling = false, done = false;
    int jump = -1;
    u32 jumping = 0, leaving = 0;
    std::vector<Copy> copies;               // not yet committed
    std::deque<std::vector<Copy>> groups;   // committed, not yet waited for
    std::vector<u32> reads;                 // rows of 16 bytes that matrix products read, not yet committed
    std::deque<std::vector<u32>> products;  // committed, not yet waited for: they may still read

    u64* row(int r) { return &registers[size_t(r) * 32]; }
    // The fragment that is furthest behind goes first: so lanes that parted meet again.
    Fragment& next() {
        auto earlier = [](const Fragment& a, const Fragment& b) { return a.at < b.at; };
        return *std::min_element(fragments.begin(), fragments.end(), earlier);
    }
};

template <class F>
inline void each(u32 lanes, F f) {
    if (lanes == ALL_LANES) {
        for (int lane = 0; lane < 32; lane++) f(lane);
    } else {
        for (int lane = 0; lane < 32; lane++)
            if (lanes >> lane & 1) f(lane);
    }
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

template <class To, class From>
inline To bits(From x) {
    To y{};
    memcpy(&y, &x, std::min(sizeof x, sizeof y));
    return y;
}

inline f32 bf16(u16 x) { return bits<f32>(u32(x) << 16); }
inline f32 f16(u16 x) { return bits<_Float16>(x); }
inline u16 to_bf16(f32 x) {
    u32 b = bits<u32>(x);
    return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline u16 to_f16(f32 x) { return x != x ? 0x7fff : bits<u16>(_Float16(x)); }
inline u32 pair(u16 low, u16 high) { return low | u32(high) << 16; }
inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// From -1 to 1, the same for the same input.
inline double noise(u32 x) {
    x *= 0x9E3779B1u, x ^= x >> 15, x *= 0x85EBCA77u, x ^= x >> 13;
    return (int(x & 0xffff) - 32768) / 32768.0;
}
inline f32 off_by(f32 relative, f32 y, u32 seed) { return f32(double(y) * (1.0 + relative * noise(seed))); }

// Errors: PTX ISA, the tables of the instructions. What is exact there stays exact, and a division by a power of two.
inline f32 ex2(f32 x) {
    x = flush(x);
    return x == 0 ? 1.0f : off_by(0x1p-22f, flush(std::exp2(x)), bits<u32>(x));
}
inline f32 ex2_with_subnormals(f32 x) { return x == 0 ? 1.0f : off_by(0x1p-22f, std::exp2(x), bits<u32>(x)); }
inline f32 lg2(f32 x) {
    f32 y = std::log2(flush(x));
    if (y == 0 || !std::isfinite(y)) return y;
    if (x > 0.5f && x < 2.0f) return f32(y + 0x1p-22 * noise(bits<u32>(x)));  // absolute: small results lose digits
    return off_by(0x1p-22f, y, bits<u32>(x));
}
inline f32 divide(f32 a, f32 b) {
    bool power_of_two = bits<u32>(b) << 9 == 0;
    return power_of_two ? a / b : off_by(0x1p-23f, a / b, bits<u32>(a) ^ bits<u32>(b) * 31);
}
inline f32 other_max(f32 a, f32 b) { return a != a ? b : b != b ? a : a > b ? a : b; }  // the operand that is no NaN
inline f32 other_min(f32 a, f32 b) { return a != a ? b : b != b ? a : a < b ? a : b; }

// A division by zero has no value that a program may count on: all ones here.
template <class T>
inline T quotient(T a, T b) {
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a)) : a / b;
}
template <class T>
inline T remainder_of(T a, T b) {
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0) : a % b;
}

// ---- memory ----------------------------------------------------------------------------------------------------------

Range& range_of(Launch& launch, u64 address, u64 size, const char* what) {
    s64 distance = INT64_MAX;
    for (auto& r : launch.ranges) {
        if (address >= r.begin && size <= r.end - r.begin && address - r.begin <= r.end - r.begin - size) return r;
        s64 d = address < r.begin ? s64(address - r.begin) : s64(address + size - r.end);
        if (std::llabs(d) < std::llabs(distance)) distance = d;
    }
    fault("%s of %d bytes, %lld bytes outside the nearest argument", what, int(size), (long long)distance);
}

void mark_global(Warp& warp, Range& range, u64 address, u32 size, bool write) {
    Program& program = *warp.program;
    if (!program.launch->watch_races) return;
    u32 me = program.id + 1;
    for (u64 i = address - range.begin; i < address - range.begin + size; i++) {
        u32 writer = range.writer[i], reader = range.reader[i];
        if (write) {
            if (writer && writer != me) fault("programs %d and %d write the same byte", writer - 1, me - 1);
            if (reader && reader != me && !program.acquired) fault("a write of what another program has read");
            range.writer[i] = me;
            range.stamp[i] = program.epoch << 8 | u32(warp.index);
        } else {
            if (writer && writer != me && !program.acquired)
                fault("a read of what program %d wrote, and no atomic between", writer - 1);
            if (writer && writer != me && !program.launch->announced[writer - 1].covers(range.stamp[i]))
                fault("a read of what warp %u of program %d wrote: an atomic of another warp announced it, and no "
                      "barrier between", range.stamp[i] & 255, writer - 1);
            range.reader[i] = reader && reader != me ? SEVERAL : me;
        }
    }
}

void touch_global(Warp& warp, u64 address, u32 size, bool write) {
    const char* what = write ? "write" : "read";
    if (address % size) fault("misaligned %s of %u bytes", what, size);
    mark_global(warp, range_of(*warp.program->launch, address, size, what), address, size, write);
}

// data: what a write will store. Warps that store the same bytes do no harm: Triton does it for what several hold.
void touch_shared(Warp& warp, u32 address, u32 size, bool write, const u8* data = nullptr) {
    Program& program = *warp.program;
    if (address < SHARED_BASE || address - SHARED_BASE + size > program.shared.size())
        fault("shared memory of %zu bytes: an access at %u", program.shared.size(), address - SHARED_BASE);
    for (u32 k = (address - SHARED_BASE) / 16; write && k <= (address - SHARED_BASE + size - 1) / 16; k++)
        if (program.in_flight[k]) fault("a write of what a matrix product may still read");
    if (!program.launch->watch_races) return;
    u32 now = program.epoch << 8, me = now | u32(warp.index + 1);
    for (u32 k = 0, i = address - SHARED_BASE; k < size; k++, i++) {
        u32 writer = program.writes[i], reader = program.reads[i];
        bool same = data && program.shared[i] == data[k];
        if (writer > now && writer != me && !same)
            fault("shared memory that warp %d wrote, and no barrier between", int(writer & 255) - 1);
        if (write && reader > now && reader != me && !same)
            fault("a write of shared memory that another warp reads, and no barrier between");
        if (write)
            program.writes[i] = me;
        else
            program.reads[i] = reader > now && reader != me ? now | 255 : me;
    }
}

// Sectors of 32 bytes that the lanes touch: what the memory system moves, however little of one is asked for.
void count_global(Warp& warp, const Instruction& i, const u64* address, u32 lanes, u32 size) {
    std::vector<u64> sectors;
    Counts& counts = warp.program->launch->counts[i.index];
    each(lanes, [&](int lane) {
        for (u64 s = address[lane] / 32; s <= (address[lane] + size - 1) / 32; s++) sectors.push_back(s);
        counts.bytes += size;
    });
    std::sort(sectors.begin(), sectors.end());
    counts.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

// Shared memory serves 128 bytes at a time, a word of 4 bytes from each of 32 banks: 32 lanes with 4 bytes each, 16
// with 8, 8 with 16. Words of one bank that differ wait for each other.
void count_shared(Warp& warp, const Instruction& i, const u32* address, u32 lanes, u32 size) {
    Counts& counts = warp.program->launch->counts[i.index];
    u32 at_once = 32 / std::max(1u, size / 4);
    for (u32 first = 0; first < 32; first += at_once) {
        std::vector<u32> words;
        for (u32 lane = first; lane < first + at_once; lane++)
            for (u32 w = 0; lanes >> lane & 1 && w < std::max(1u, size / 4); w++) words.push_back(address[lane] / 4 + w);
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int per_bank[32] = {};
        for (u32 w : words) per_bank[w % 32]++;
        counts.wavefronts += *std::max_element(per_bank, per_bank + 32);
        counts.least++;
    }
}

const u8* read_shared(Warp& warp, u32 address, u32 size) {
    if (address % size) fault("misaligned read of shared memory: %u bytes at %u", size, address);
    touch_shared(warp, address, size, false);
    return &warp.program->shared[address - SHARED_BASE];
}
void write_shared(Warp& warp, u32 address, const void* data, u32 size) {
    if (address % size) fault("misaligned write of shared memory: %u bytes at %u", size, address);
    touch_shared(warp, address, size, true, (const u8*)data);
    memcpy(&warp.program->shared[address - SHARED_BASE], data, size);
}

inline u64 load(const void* from, int size) {
    u64 x = 0;
    memcpy(&x, from, size);
    return x;
}
inline u64 extend(u64 x, int size, bool is_signed) {
    int unused = 64 - 8 * size;
    return is_signed ? u64(s64(x << unused) >> unused) : x;
}

template <bool SHARED>
void count_access(Warp& w, const Instruction& i, int row, s64 offset, u32 lanes, u32 size) {
    using Address = std::conditional_t<SHARED, u32, u64>;
    Address address[32];
    for (int lane = 0; lane < 32; lane++) address[lane] = w.row(row)[lane] + offset;
    if constexpr (SHARED)
        count_shared(w, i, address, lanes, size);
    else
        count_global(w, i, address, lanes, size);
}

// Loads: rows d[vector], address; numbers vector, bytes each, signed, offset, mask of d's width. ld.param: no address.
// Stores: rows address, x[vector]; numbers vector, bytes each, offset.
template <bool SHARED>
void load_vector(Warp& w, const Instruction& i, u32 lanes) {
    int vector = i.numbers[0], size = i.numbers[1];
    count_access<SHARED>(w, i, i.rows[vector], i.numbers[3], lanes, size * vector);
    u64* address = w.row(i.rows[vector]);
    each(lanes, [&](int lane) {
        u64 from = address[lane] + i.numbers[3];
        const u8* p = (const u8*)from;
        if (SHARED)
            p = read_shared(w, u32(from), size * vector);
        else
            touch_global(w, from, size * vector, false);
        u64 x[8];
        for (int k = 0; k < vector; k++) x[k] = extend(load(p + k * size, size), size, i.numbers[2]) & u64(i.numbers[4]);
        for (int k = 0; k < vector; k++)
            if (i.rows[k] >= 0) w.row(i.rows[k])[lane] = x[k];
    });
}
template <bool SHARED>
void store_vector(Warp& w, const Instruction& i, u32 lanes) {
    int vector = i.numbers[0], size = i.numbers[1];
    count_access<SHARED>(w, i, i.rows[0], i.numbers[2], lanes, size * vector);
    each(lanes, [&](int lane) {
        u8 data[32];
        for (int k = 0; k < vector; k++) memcpy(data + k * size, &w.row(i.rows[1 + k])[lane], size);
        u64 to = w.row(i.rows[0])[lane] + i.numbers[2];
        if (SHARED) {
            write_shared(w, u32(to), data, size * vector);
        } else {
            touch_global(w, to, size * vector, true);
            memcpy((void*)to, data, size * vector);
        }
    });
}
void load_parameter(Warp& w, const Instruction& i, u32 lanes) {
    int size = i.numbers[1];
    u64 x = extend(load(&w.program->launch->parameters[i.numbers[3]], size), size, i.numbers[2]) & u64(i.numbers[4]);
    each(lanes, [&](int lane) { w.row(i.rows[0])[lane] = x; });
}

// cp.async: rows to, from, [bytes to read, the rest is zero]; numbers size, offsets. It lands when it is waited for.
void copy_async(Warp& w, const Instruction& i, u32 lanes) {
    auto size_read = [&](int lane) { return i.rows.size() > 2 ? u32(w.row(i.rows[2])[lane]) : u32(i.numbers[0]); };
    u32 reading = 0;
    each(lanes, [&](int lane) { reading |= u32(size_read(lane) > 0) << lane; });
    count_access<false>(w, i, i.rows[1], i.numbers[2], reading, i.numbers[0]);
    count_access<true>(w, i, i.rows[0], i.numbers[1], lanes, i.numbers[0]);
    each(lanes, [&](int lane) {
        u32 size = i.numbers[0], to = u32(w.row(i.rows[0])[lane] + i.numbers[1]);
        u32 from_size = size_read(lane);
        u64 from = w.row(i.rows[1])[lane] + i.numbers[2];
        if (from_size) {
            if (from % size) fault("cp.async of %u bytes from a misaligned address", size);
            mark_global(w, range_of(*w.program->launch, from, from_size, "cp.async"), from, from_size, false);
        }
        if (from_size > size || to % size) fault("cp.async of %u bytes, of which %u are read, to %u", size, from_size, to);
        touch_shared(w, to, size, true);
        memset(&w.program->shared[to - SHARED_BASE], 0xff, size);  // until it lands
        w.copies.push_back({to, size, from_size, from});
    });
}
void land(Warp& w, size_t groups_left) {
    for (; w.groups.size() > groups_left; w.groups.pop_front()) {
        for (auto& copy : w.groups.front()) {
            touch_shared(w, copy.to, copy.size, true);
            u8* to = &w.program->shared[copy.to - SHARED_BASE];
            memset(to, 0, copy.size);
            memcpy(to, (const void*)copy.from, copy.from_size);
        }
    }
}
void commit_copies(Warp& w, const Instruction&, u32) {
    w.groups.push_back(std::move(w.copies));
    w.copies.clear();
}
void wait_for_copies(Warp& w, const Instruction& i, u32 lanes) {  // numbers groups left, whether to commit before
    if (i.numbers[1]) commit_copies(w, i, lanes);
    land(w, i.numbers[0]);
}

void atomic_add(Warp& w, const Instruction& i, u32 lanes) {  // rows old, address, x; numbers offset, float, acquires
    each(lanes, [&](int lane) {
        u64 address = w.row(i.rows[1])[lane] + i.numbers[0];
        if (address % 4) fault("misaligned atomic");
        range_of(*w.program->launch, address, 4, "atomic");
        u32 old = load((void*)address, 4), x = w.row(i.rows[2])[lane];
        u32 sum = i.numbers[1] ? bits<u32>(bits<f32>(old) + bits<f32>(x)) : old + x;
        memcpy((void*)address, &sum, 4);
        if (i.rows[0] >= 0) w.row(i.rows[0])[lane] = old;
        if (!i.numbers[2]) return;
        w.program->acquired = true;
        Announced& announced = w.program->launch->announced[w.program->id];
        announced.by_warp.resize(w.program->warps.size());
        announced.by_warp[w.index] = announced.epoch = w.program->epoch;
    });
}

// ---- between lanes ---------------------------------------------------------------------------------------------------

enum Shuffle { BUTTERFLY, INDEX, UP, DOWN };

void shuffle(Warp& w, const Instruction& i, u32) {  // rows d, x, lane, clamp; numbers mode
    u64 out[32], *x = w.row(i.rows[1]), *b = w.row(i.rows[2]), *c = w.row(i.rows[3]);
    int mode = i.numbers[0];
    for (int lane = 0; lane < 32; lane++) {
        int clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, by = b[lane] & 31;
        int limit = (lane & segment) | (clamp & ~segment);
        int from = mode == BUTTERFLY ? lane ^ by : mode == UP ? lane - by : mode == DOWN ? lane + by : by;
        if (mode == INDEX) from = (lane & segment) | (by & ~segment);
        out[lane] = x[(mode == UP ? from >= limit : from <= limit) ? from & 31 : lane];
    }
    memcpy(w.row(i.rows[0]), out, sizeof out);
}
template <class T, T (*COMBINE)(T, T)>
void reduce_lanes(Warp& w, const Instruction& i, u32) {  // rows d, x
    T all = T(w.row(i.rows[1])[0]);
    for (int lane = 1; lane < 32; lane++) all = COMBINE(all, T(w.row(i.rows[1])[lane]));
    std::fill_n(w.row(i.rows[0]), 32, bits<u64>(all));
}
template <class T>
T sum_of(T a, T b) { return a + b; }
template <class T>
T most_of(T a, T b) { return std::max(a, b); }
void elect(Warp& w, const Instruction& i, u32) {  // rows lane or "_", predicate
    for (int lane = 0; lane < 32; lane++) {
        if (i.rows[0] >= 0) w.row(i.rows[0])[lane] = 0;
        w.row(i.rows[1])[lane] = lane == 0;
    }
}

// ldmatrix, stmatrix: 8 x 8 tiles of 16 bits, their rows at the addresses of lanes 8 k to 8 k + 7. A lane holds two
// neighbours of a row, of a column if transposed. Load: rows d[count], address; store: address, x[count].
// Numbers count, transposed, offset.
void load_matrix(Warp& w, const Instruction& i, u32) {
    int count = i.numbers[0];
    count_access<true>(w, i, i.rows[count], i.numbers[2], ALL_LANES >> (32 - 8 * count), 16);
    u64* address = w.row(i.rows[count]);
    u16 tile[4][8][8];
    for (int k = 0; k < 8 * count; k++)
        memcpy(tile[k / 8][k % 8], read_shared(w, u32(address[k] + i.numbers[2]), 16), 16);
    for (int k = 0; k < count; k++)
        for (int lane = 0; lane < 32; lane++) {
            int r = lane / 4, c = 2 * (lane % 4);
            bool t = i.numbers[1];
            w.row(i.rows[k])[lane] = pair(t ? tile[k][c][r] : tile[k][r][c], t ? tile[k][c + 1][r] : tile[k][r][c + 1]);
        }
}
void store_matrix(Warp& w, const Instruction& i, u32) {
    int count = i.numbers[0];
    count_access<true>(w, i, i.rows[0], i.numbers[2], ALL_LANES >> (32 - 8 * count), 16);
    u64* address = w.row(i.rows[0]);
    u16 tile[4][8][8];
    for (int k = 0; k < count; k++)
        for (int lane = 0; lane < 32; lane++) {
            int r = lane / 4, c = 2 * (lane % 4);
            u32 x = u32(w.row(i.rows[1 + k])[lane]);
            (i.numbers[1] ? tile[k][c][r] : tile[k][r][c]) = x;
            (i.numbers[1] ? tile[k][c + 1][r] : tile[k][r][c + 1]) = x >> 16;
        }
    for (int k = 0; k < 8 * count; k++) write_shared(w, u32(address[k] + i.numbers[2]), tile[k / 8][k % 8], 16);
}

// ---- the matrix unit: sums in fp32 -----------------------------------------------------------------------------------

template <f32 (*VALUE)(u16)>
void read_a(Warp& w, const int* rows, f32 a[16][16]) {
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < 4; k++) {
            u32 x = u32(w.row(rows[k])[lane]);
            f32* at = &a[lane / 4 + 8 * (k & 1)][2 * (lane % 4) + 8 * (k >> 1)];
            at[0] = VALUE(x), at[1] = VALUE(x >> 16);
        }
}
// Where the k-th accumulator of a lane lies.
inline int row_of(int lane, int k) { return lane / 4 + 8 * (k >> 1 & 1); }
inline int column_of(int lane, int k) { return 8 * (k / 4) + 2 * (lane % 4) + (k & 1); }

template <int N, class A, class B>
void accumulate(Warp& w, const int* to, const int* from, int n, int depth, const A& a, const B& b) {
    f32 c[16][N];
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < n / 2; k++)
            c[row_of(lane, k)][column_of(lane, k)] = from ? bits<f32>(u32(w.row(from[k])[lane])) : 0.0f;
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < depth; k++)
            for (int col = 0; col < n; col++) c[r][col] += a[r][k] * b[k][col];
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < n / 2; k++) w.row(to[k])[lane] = bits<u32>(c[row_of(lane, k)][column_of(lane, k)]);
}

template <f32 (*VALUE)(u16)>
void mma(Warp& w, const Instruction& i, u32) {  // m16n8k16: rows d[4], a[4], b[2], c[4]
    f32 a[16][16], b[16][8];
    read_a<VALUE>(w, &i.rows[4], a);
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < 2; k++) {
            u32 x = u32(w.row(i.rows[8 + k])[lane]);
            int r = 2 * (lane % 4) + 8 * k, c = lane / 4;
            b[r][c] = VALUE(x), b[r + 1][c] = VALUE(x >> 16);
        }
    accumulate<8>(w, &i.rows[0], &i.rows[10], 8, 16, a, b);
}

// A matrix of 16-bit values in shared memory, as a descriptor of wgmma tells (PTX ISA, "Matrix Descriptor Format").
struct Descriptor {
    u32 start, leading, stride, width, swizzle;
    bool transposed;

    Descriptor(u64 d, bool transposed) : transposed(transposed) {
        start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
        int mode = d >> 62;  // 1: rows of 128 bytes, 2: 64, 3: 32
        if (mode == 0 || d >> 49 & 7) fault("wgmma: a descriptor without swizzle, or with a base offset");
        width = 256 >> mode, swizzle = width / 16 - 1;
    }
    // Address of element (row of A or column of B, k).
    u32 at(u32 mn, u32 k) const {
        u32 a = transposed ? start + mn / (width / 2) * leading + k / 8 * stride + k % 8 * width + mn % (width / 2) * 2
                           : start + mn / 8 * stride + mn % 8 * width + k * 2;
        return a ^ (a >> 7 & swizzle) << 4;
    }
};

// rows d[n / 2], a[4] or its descriptor, descriptor of b, whether to add to d; numbers n, a in registers, transposed a
// and b. Every warp makes the 16 rows that are its own.
template <f32 (*VALUE)(u16)>
void wgmma(Warp& w, const Instruction& i, u32) {
    int n = i.numbers[0];
    if (w.program->launch->num_threads % 128) fault("wgmma takes groups of four warps");
    f32 a[16][16], b[16][256];
    auto fetch = [&](u32 address) {
        w.reads.push_back(address & ~15u);
        return VALUE(load(read_shared(w, address, 2), 2));
    };
    const int* operand = &i.rows[n / 2];
    if (i.numbers[1]) {
        read_a<VALUE>(w, operand, a);
        operand += 4;
    } else {
        Descriptor d(w.row(*operand++)[0], i.numbers[2]);
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < 16; k++) a[r][k] = fetch(d.at(16 * (w.index % 4) + r, k));
    }
    Descriptor d(w.row(operand[0])[0], i.numbers[3]);
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < n; c++) b[k][c] = fetch(d.at(c, k));
    accumulate<256>(w, &i.rows[0], w.row(operand[1])[0] ? &i.rows[0] : nullptr, n, 16, a, b);
}
void commit_products(Warp& w, const Instruction&, u32) {
    std::sort(w.reads.begin(), w.reads.end());
    w.reads.erase(std::unique(w.reads.begin(), w.reads.end()), w.reads.end());
    for (u32 address : w.reads) w.program->in_flight[(address - SHARED_BASE) / 16]++;
    w.products.push_back(std::move(w.reads));
    w.reads.clear();
}
void wait_for_products(Warp& w, const Instruction& i, u32) {  // until here they may have read their operands
    for (; w.products.size() > size_t(i.numbers[0]); w.products.pop_front())
        for (u32 address : w.products.front()) {
            touch_shared(w, address, 16, false);
            w.program->in_flight[(address - SHARED_BASE) / 16]--;
        }
}

// ---- the copy engine (TMA) -------------------------------------------------------------------------------------------

// A tensor map. Its 128 bytes are NVIDIA's own; here they hold this.
struct TensorMap {
    u64 address, stride[4];
    u32 rank, type, box[5], size[5], step[5], interleave, swizzle, fill;

    u32 element() const { return type == 0 ? 1 : type == 1 || type == 6 || type == 10 ? 2 : type == 7 ? 4 : 0; }
    u32 box_elements() const {
        u32 n = 1;
        for (u32 k = 0; k < rank; k++) n *= box[k];
        return n;
    }
};
static_assert(sizeof(TensorMap) <= 128);

void replace_in_map(Warp& w, const Instruction& i, u32 lanes) {  // rows map[, value]; numbers field, index, value
    each(lanes, [&](int lane) {
        u32 address = u32(w.row(i.rows[0])[lane]);
        u64 x = i.rows.size() > 1 ? w.row(i.rows[1])[lane] : u64(i.numbers[2]);
        int k = i.numbers[1];
        TensorMap map;
        memcpy(&map, read_shared(w, address, 128), sizeof map);
        switch (i.numbers[0]) {  // FIELDS in ptx.py
            case 0: map.address = x; break;
            case 1: map.rank = x + 1; break;
            case 2: map.box[k] = x; break;
            case 3: map.size[k] = x; break;
            case 4: map.stride[k] = x; break;
            case 5: map.step[k] = x; break;
            case 6: map.type = x; break;
            case 7: map.interleave = x; break;
            case 8: map.swizzle = x; break;
            case 9: map.fill = x; break;
        }
        u8 data[128] = {};
        memcpy(data, &map, sizeof map);
        write_shared(w, address, data, 128);
    });
}
void publish_map(Warp& w, const Instruction& i, u32 lanes) {  // rows to, from: one map, whichever lanes are there
    int lane = __builtin_ctz(lanes);
    u64 to = w.row(i.rows[0])[lane];
    touch_global(w, to, 128, true);
    memcpy((void*)to, read_shared(w, u32(w.row(i.rows[1])[lane]), 128), 128);
}

void tma_load(Warp& w, const Instruction& i, u32 lanes) {  // rows to, map, coordinates[rank], mbarrier; numbers rank
    if (__builtin_popcount(lanes) != 1) fault("TMA: issued by %d lanes", __builtin_popcount(lanes));
    int lane = __builtin_ctz(lanes), rank = i.numbers[0];
    TmaLoad job{w.row(i.rows[1])[lane], {}, u32(w.row(i.rows[0])[lane]), u32(w.row(i.rows[2 + rank])[lane])};
    for (int k = 0; k < rank; k++) job.coordinates[k] = s32(w.row(i.rows[2 + k])[lane]);
    range_of(*w.program->launch, job.map, 128, "TMA: a tensor map");
    TensorMap map;
    memcpy(&map, (void*)job.map, sizeof map);
    u32 element = map.element(), inner = map.box[0] * element;
    if (int(map.rank) != rank) fault("TMA: %d coordinates, a map of rank %u", rank, map.rank);
    if (!element || map.interleave || map.fill) fault("TMA: an element type, interleave or fill that is not known here");
    if (map.address % 16) fault("TMA: a tensor that does not begin at 16 bytes");
    for (int k = 0; k + 1 < rank; k++)
        if (map.stride[k] % 16 || map.stride[k] >> 40) fault("TMA: a stride of %llu", (unsigned long long)map.stride[k]);
    for (int k = 0; k < rank; k++)
        if (!map.box[k] || map.box[k] > 256 || map.step[k] != 1) fault("TMA: a box of %u", map.box[k]);
    if (inner % 16 || (map.swizzle && inner > 16u << map.swizzle)) fault("TMA: inner box of %u bytes", inner);
    if (job.to % 128) fault("TMA: to an address not at 128 bytes");
    for (u32 a = job.to; a < job.to + map.box_elements() * element; a += 16) {
        u32 to = a ^ (a >> 7 & ((1u << map.swizzle) - 1)) << 4;
        touch_shared(w, to, 16, true);
        memset(&w.program->shared[to - SHARED_BASE], 0xff, 16);  // until it lands
    }
    w.program->tma.push_back(job);
}
Mbarrier& mbarrier_at(Program& program, u64 address) {
    auto found = program.mbarriers.find(u32(address));
    if (found == program.mbarriers.end()) fault("no mbarrier at %u", u32(address));
    return found->second;
}
void run_tma(Program& program, const TmaLoad& job) {
    TensorMap map;
    memcpy(&map, (void*)job.map, sizeof map);
    u32 size = map.element(), swizzle = (1u << map.swizzle) - 1;
    for (u32 e = 0; e < map.box_elements(); e++) {
        u32 rest = e;
        bool inside = true;
        u64 from = map.address;
        for (u32 k = 0; k < map.rank; k++) {
            s64 x = job.coordinates[k] + rest % map.box[k];
            rest /= map.box[k];
            inside &= x >= 0 && x < s64(map.size[k]);
            from += x * (k ? map.stride[k - 1] : size);
        }
        u32 to = job.to + e * size;
        to ^= (to >> 7 & swizzle) << 4;
        memset(&program.shared[to - SHARED_BASE], 0, size);
        if (inside) {
            range_of(*program.launch, from, size, "TMA");
            memcpy(&program.shared[to - SHARED_BASE], (void*)from, size);
        }
        if (program.launch->watch_races) std::fill_n(&program.writes[to - SHARED_BASE], size, 0);  // the mbarrier orders
    }
    Mbarrier& barrier = mbarrier_at(program, job.barrier);
    barrier.bytes -= map.box_elements() * size;
    barrier.settle();
}

void mbarrier_init(Warp& w, const Instruction& i, u32 lanes) {
    u32 count = i.numbers[0];
    each(lanes, [&](int lane) {
        u32 address = u32(w.row(i.rows[0])[lane]);
        u64 nothing_yet = 0;
        write_shared(w, address, &nothing_yet, 8);
        w.program->mbarriers[address] = {count, count, 0, 0};
    });
}
void mbarrier_invalidate(Warp& w, const Instruction& i, u32 lanes) {
    each(lanes, [&](int lane) {
        u64 address = w.row(i.rows[0])[lane];
        mbarrier_at(*w.program, address);  // there has to be one
        w.program->mbarriers.erase(u32(address));
    });
}
void mbarrier_expect(Warp& w, const Instruction& i, u32 lanes) {  // one arrival, which announces bytes
    each(lanes, [&](int lane) {
        Mbarrier& b = mbarrier_at(*w.program, w.row(i.rows[0])[lane]);
        if (b.pending == 0) fault("mbarrier: one arrival too many");
        b.bytes += i.numbers[0], b.pending--;
        b.settle();
        w.program->idle = 0;
    });
}
void mbarrier_try_wait(Warp& w, const Instruction& i, u32 lanes) {  // rows complete, mbarrier, parity of the phase
    each(lanes, [&](int lane) {
        bool complete = mbarrier_at(*w.program, w.row(i.rows[1])[lane]).phase != (w.row(i.rows[2])[lane] & 1);
        w.row(i.rows[0])[lane] = complete;
        w.polling |= !complete;
    });
}

// ---- control ---------------------------------------------------------------------------------------------------------

void branch(Warp& w, const Instruction& i, u32 lanes) { w.jump = i.numbers[0], w.jumping = lanes; }
void leave(Warp& w, const Instruction&, u32 lanes) { w.leaving = lanes; }
void barrier(Warp& w, const Instruction&, u32) { w.at_barrier = true; }
void nothing(Warp&, const Instruction&, u32) {}
void trap(Warp&, const Instruction&, u32) { fault("a trap: an assertion of the kernel failed"); }

// ---- arithmetic ------------------------------------------------------------------------------------------------------

std::unordered_map<std::string, Handler> handlers;

// One line an instruction: its name, the types of a, b (T) and c (U), the type of the result, and what it is.
#define DEFINE(name, T, U, RESULT, expression)                                          \
    handlers[name] = [](Warp& w, const Instruction& i, u32 lanes) {                     \
        u64 *d = w.row(i.rows[0]), *x = w.row(i.rows[1]);                               \
        u64 *y = w.row(i.rows[i.rows.size() > 2 ? 2 : 1]);                              \
        u64* z = w.row(i.rows[i.rows.size() > 3 ? 3 : 1]);                              \
        each(lanes, [&](int lane) {                                                     \
            [[maybe_unused]] T a = bits<T>(x[lane]), b = bits<T>(y[lane]);              \
            [[maybe_unused]] U c = bits<U>(z[lane]);                                    \
            d[lane] = bits<u64>(RESULT(expression));                                    \
        });                                                                             \
    };

template <class S, class U>
void define_integers(const std::string& size) {
    constexpr u32 BITS = 8 * sizeof(S);
    for (std::string t : {"s" + size, "u" + size, "b" + size}) {
        DEFINE("add." + t, U, U, U, a + b)
        DEFINE("sub." + t, U, U, U, a - b)
        DEFINE("mul.lo." + t, U, U, U, a * b)
        DEFINE("mad.lo." + t, U, U, U, a * b + c)
        DEFINE("and." + t, U, U, U, a & b)
        DEFINE("or." + t, U, U, U, a | b)
        DEFINE("xor." + t, U, U, U, a ^ b)
        DEFINE("not." + t, U, U, U, ~a)
        DEFINE("mov." + t, U, U, U, a)
        DEFINE("shl." + t, u64, u64, U, u32(b) < BITS ? a << u32(b) : 0)
        DEFINE("shr." + t, u64, u64, U, u32(b) < BITS ? U(a) >> u32(b) : 0)
        DEFINE("selp." + t, U, u64, U, c ? a : b)
        DEFINE("setp.eq." + t, U, U, u64, a == b)
        DEFINE("setp.ne." + t, U, U, u64, a != b)
    }
    std::string s = "s" + size, u = "u" + size;
    DEFINE("neg." + s, S, S, S, -a)
    DEFINE("abs." + s, S, S, S, a < 0 ? -a : a)
    DEFINE("shr." + s, u64, u64, S, S(a) >> std::min(u32(b), BITS - 1))
    DEFINE("min." + s, S, S, S, std::min(a, b))
    DEFINE("max." + s, S, S, S, std::max(a, b))
    DEFINE("min.relu." + s, S, S, S, std::max(S(0), std::min(a, b)))
    DEFINE("max.relu." + s, S, S, S, std::max(S(0), std::max(a, b)))
    DEFINE("div." + s, S, S, S, quotient(a, b))
    DEFINE("rem." + s, S, S, S, remainder_of(a, b))
    DEFINE("setp.lt." + s, S, S, u64, a < b)
    DEFINE("setp.le." + s, S, S, u64, a <= b)
    DEFINE("setp.gt." + s, S, S, u64, a > b)
    DEFINE("setp.ge." + s, S, S, u64, a >= b)
    DEFINE("min." + u, U, U, U, std::min(a, b))
    DEFINE("max." + u, U, U, U, std::max(a, b))
    DEFINE("div." + u, U, U, U, quotient(a, b))
    DEFINE("rem." + u, U, U, U, remainder_of(a, b))
    DEFINE("setp.lt." + u, U, U, u64, a < b)
    DEFINE("setp.le." + u, U, U, u64, a <= b)
    DEFINE("setp.gt." + u, U, U, u64, a > b)
    DEFINE("setp.ge." + u, U, U, u64, a >= b)
}

template <bool FTZ>
inline f32 kept(f32 x) {
    return FTZ ? flush(x) : x;
}
template <bool FTZ>
void define_floats(const std::string& type) {
    DEFINE("add" + type, f32, f32, f32, kept<FTZ>(kept<FTZ>(a) + kept<FTZ>(b)))
    DEFINE("sub" + type, f32, f32, f32, kept<FTZ>(kept<FTZ>(a) - kept<FTZ>(b)))
    DEFINE("mul" + type, f32, f32, f32, kept<FTZ>(kept<FTZ>(a) * kept<FTZ>(b)))
    DEFINE("fma.rn" + type, f32, f32, f32, kept<FTZ>(std::fma(kept<FTZ>(a), kept<FTZ>(b), kept<FTZ>(c))))
    DEFINE("neg" + type, f32, f32, f32, -kept<FTZ>(a))
    DEFINE("abs" + type, f32, f32, f32, std::fabs(kept<FTZ>(a)))
    DEFINE("max" + type, f32, f32, f32, other_max(kept<FTZ>(a), kept<FTZ>(b)))
    DEFINE("min" + type, f32, f32, f32, other_min(kept<FTZ>(a), kept<FTZ>(b)))
}

// bf16 and f16, one or two in a register. In a pair of cvt the second operand is the low half.
#define DEFINE_HALVES(type, FROM, TO)                                                                          \
    DEFINE("add." type, u16, u16, u16, TO(FROM(a) + FROM(b)))                                                  \
    DEFINE("fma.rn." type, u16, u16, u16, TO(std::fma(FROM(a), FROM(b), FROM(c))))                             \
    DEFINE("abs." type, u16, u16, u16, a & 0x7fff)                                                             \
    DEFINE("add." type "x2", u32, u32, u32, pair(TO(FROM(a) + FROM(b)), TO(FROM(a >> 16) + FROM(b >> 16))))    \
    DEFINE("fma.rn." type "x2", u32, u32, u32,                                                                 \
           pair(TO(std::fma(FROM(a), FROM(b), FROM(c))),                                                       \
                TO(std::fma(FROM(a >> 16), FROM(b >> 16), FROM(c >> 16)))))                                    \
    DEFINE("abs." type "x2", u32, u32, u32, a & 0x7fff7fff)                                                    \
    DEFINE("cvt.f32." type, u16, u16, f32, FROM(a))                                                            \
    DEFINE("cvt.rn." type ".f32", f32, f32, u16, TO(a))                                                        \
    DEFINE("cvt.rn." type "x2.f32", f32, f32, u32, pair(TO(b), TO(a)))

inline u32 permute(u64 x, u32 selector) {
    u32 out = 0;
    for (int k = 0; k < 4; k++) {
        u32 nibble = selector >> 4 * k & 15;
        u8 byte = x >> 8 * (nibble & 7);
        out |= u32(nibble & 8 ? (byte & 0x80 ? 255 : 0) : byte) << 8 * k;
    }
    return out;
}
inline s64 field(s64 x, u32 from, u32 size, bool is_signed) {  // x: sign-extended where is_signed
    s64 rest = x >> std::min(from, 32u);
    if (size >= 32) return rest;
    return is_signed && size ? s64(u64(rest) << (64 - size)) >> (64 - size) : rest & ((s64(1) << size) - 1);
}
void pack(Warp& w, const Instruction& i, u32 lanes) {  // rows d, parts[count]; numbers count, bits each
    each(lanes, [&](int lane) {
        u64 x = 0;
        for (int k = 0; k < i.numbers[0]; k++) x |= w.row(i.rows[1 + k])[lane] << i.numbers[1] * k;
        w.row(i.rows[0])[lane] = x;
    });
}
void unpack(Warp& w, const Instruction& i, u32 lanes) {  // rows parts[count], x; numbers count, bits each
    each(lanes, [&](int lane) {
        u64 x = w.row(i.rows[i.numbers[0]])[lane];
        for (int k = 0; k < i.numbers[0]; k++)
            if (i.rows[k] >= 0) w.row(i.rows[k])[lane] = x >> i.numbers[1] * k & ((u64(1) << i.numbers[1]) - 1);
    });
}

void define_all() {
    define_integers<s16, u16>("16");
    define_integers<s32, u32>("32");
    define_integers<s64, u64>("64");
    define_floats<false>(".f32");
    define_floats<true>(".ftz.f32");
    DEFINE_HALVES("bf16", bf16, to_bf16)
    DEFINE_HALVES("f16", f16, to_f16)
    DEFINE("and.pred", u64, u64, u64, a & b)
    DEFINE("or.pred", u64, u64, u64, a | b)
    DEFINE("xor.pred", u64, u64, u64, (a ^ b) & 1)
    DEFINE("not.pred", u64, u64, u64, !a)
    DEFINE("mov.pred", u64, u64, u64, a != 0)
    DEFINE("max.NaN.f32", f32, f32, f32, a != a || b != b ? NAN : std::max(a, b))
    DEFINE("mul.wide.s32", s32, s64, s64, s64(a) * b)
    DEFINE("mul.wide.u32", u32, u64, u64, u64(a) * b)
    DEFINE("mad.wide.s32", s32, s64, s64, s64(a) * b + c)
    DEFINE("mad.wide.u32", u32, u64, u64, u64(a) * b + c)
    DEFINE("mul.hi.s32", s32, s64, s32, s64(a) * b >> 32)
    DEFINE("mul.hi.u32", u32, u64, u32, u64(a) * b >> 32)
    DEFINE("mul.hi.u16", u16, u32, u16, u32(a) * b >> 16)
    DEFINE("mul.hi.s64", s64, s64, s64, s64(__int128(a) * b >> 64))
    DEFINE("mul.hi.u64", u64, u64, u64, u64((unsigned __int128)a * b >> 64))
    DEFINE("div.full.f32", f32, f32, f32, divide(a, b))
    DEFINE("rsqrt.approx.ftz.f32", f32, f32, f32, off_by(0x1p-23f, f32(1 / std::sqrt(double(flush(a)))), bits<u32>(a)))
    DEFINE("sqrt.approx.ftz.f32", f32, f32, f32, off_by(0x1p-23f, f32(std::sqrt(double(flush(a)))), bits<u32>(a)))
    DEFINE("ex2.approx.ftz.f32", f32, f32, f32, ex2(a))
    DEFINE("ex2.approx.f32", f32, f32, f32, ex2_with_subnormals(a))
    DEFINE("lg2.approx.ftz.f32", f32, f32, f32, lg2(a))
    DEFINE("selp.f32", u32, u64, u32, c ? a : b)
    DEFINE("setp.eq.f32", f32, f32, u64, a == b)
    DEFINE("setp.ne.f32", f32, f32, u64, a < b || a > b)
    DEFINE("setp.lt.f32", f32, f32, u64, a < b)
    DEFINE("setp.le.f32", f32, f32, u64, a <= b)
    DEFINE("setp.gt.f32", f32, f32, u64, a > b)
    DEFINE("setp.ge.f32", f32, f32, u64, a >= b)
    DEFINE("setp.equ.f32", f32, f32, u64, !(a < b || a > b))  // u: true for a NaN as well
    DEFINE("setp.neu.f32", f32, f32, u64, a != b)
    DEFINE("setp.ltu.f32", f32, f32, u64, !(a >= b))
    DEFINE("setp.leu.f32", f32, f32, u64, !(a > b))
    DEFINE("setp.gtu.f32", f32, f32, u64, !(a <= b))
    DEFINE("setp.geu.f32", f32, f32, u64, !(a < b))
    DEFINE("cvt.rn.f32.s32", s32, s32, f32, a)
    DEFINE("cvt.rn.f32.u32", u32, u32, f32, a)
    DEFINE("cvt.s64.s32", s32, s32, s64, a)
    DEFINE("cvt.u64.u32", u32, u32, u64, a)
    DEFINE("cvt.u64.u16", u16, u16, u64, a)
    DEFINE("cvt.u32.u64", u64, u64, u32, a)
    DEFINE("cvt.u32.u16", u16, u16, u32, a)
    DEFINE("cvt.u16.u32", u32, u32, u16, a)
    DEFINE("popc.b32", u32, u32, u32, __builtin_popcount(a))
    DEFINE("bfe.u32", u32, u32, u32, field(a, b & 255, c & 255, false))
    DEFINE("bfe.s32", s32, u32, s32, field(a, b & 255, c & 255, true))
    DEFINE("shf.l.wrap.b32", u32, u32, u32, (u64(b) << 32 | a) << (c & 31) >> 32)
    DEFINE("prmt.b32", u32, u32, u32, permute(u64(b) << 32 | a, c))
    handlers.insert({
        {"pack", pack},
        {"unpack", unpack},
        {"ld.param", load_parameter},
        {"ld.global", load_vector<false>},
        {"ld.shared", load_vector<true>},
        {"st.global", store_vector<false>},
        {"st.shared", store_vector<true>},
        {"cp.async", copy_async},
        {"cp.async.commit_group", commit_copies},
        {"cp.async.wait_group", wait_for_copies},
        {"atom.add", atomic_add},
        {"shfl", shuffle},
        {"redux.add.s32", reduce_lanes<u32, sum_of>},
        {"redux.add.u32", reduce_lanes<u32, sum_of>},
        {"redux.max.s32", reduce_lanes<s32, most_of>},
        {"redux.max.u32", reduce_lanes<u32, most_of>},
        {"elect", elect},
        {"ldmatrix", load_matrix},
        {"stmatrix", store_matrix},
        {"mma.bf16", mma<bf16>},
        {"mma.f16", mma<f16>},
        {"wgmma.bf16", wgmma<bf16>},
        {"wgmma.f16", wgmma<f16>},
        {"wgmma.commit_group", commit_products},
        {"wgmma.wait_group", wait_for_products},
        {"tensormap.replace", replace_in_map},
        {"tensormap.publish", publish_map},
        {"tma.load", tma_load},
        {"mbarrier.init", mbarrier_init},
        {"mbarrier.inval", mbarrier_invalidate},
        {"mbarrier.expect_tx", mbarrier_expect},
        {"mbarrier.try_wait", mbarrier_try_wait},
        {"bra", branch},
        {"ret", leave},
        {"bar.sync", barrier},
        {"nothing", nothing},
        {"trap", trap},
    });
}

bool of_whole_warp(const std::string& handler) {
    for (const char* start : {"shfl", "redux", "elect", "ldmatrix", "stmatrix", "bar.", "mma.", "wgmma.", "cp.async."})
        if (handler.rfind(start, 0) == 0) return true;
    return false;
}

// ---- running ---------------------------------------------------------------------------------------------------------

void step(Warp& w) {
    Fragment& now = w.next();
    const Instruction& i = w.program->launch->code->instructions[now.at];
    u32 lanes = now.lanes;
    if (i.guard >= 0) {
        u64* on = w.row(i.guard);
        for (int lane = 0; lane < 32; lane++)
            if (bool(on[lane]) == bool(i.negated)) lanes &= ~(1u << lane);
    }
    u32 here = now.lanes != ALL_LANES ? now.lanes : lanes;
    if (i.whole_warp && here && here != ALL_LANES) fault("only the lanes %08x are here", here);
    if (lanes) w.program->launch->counts[i.index].warps++, i.run(w, i, lanes);
    if (w.jump >= 0) {
        Fragment jumped{w.jump, w.jumping};
        w.jump = -1;
        now.lanes &= ~jumped.lanes, now.at++;
        w.fragments.push_back(jumped);
    } else {
        now.lanes &= ~w.leaving, now.at++;
        w.leaving = 0;
    }
    if (w.fragments.size() > 1 || !w.fragments[0].lanes) {
        std::map<int, u32> merged;
        for (auto& f : w.fragments)
            if (f.lanes) merged[f.at] |= f.lanes;
        w.fragments.clear();
        for (auto [at, here] : merged) w.fragments.push_back({at, here});
        if (w.fragments.empty()) {
            if (w.reads.size() + w.products.size()) fault("the end, before its matrix products were waited for");
            commit_copies(w, i, 0);
            land(w, 0);
            w.done = true;
        }
    }
}

std::unique_ptr<Program> start(Launch& launch, int id) {
    auto program = std::make_unique<Program>();
    u32* grid = launch.grid;
    program->launch = &launch, program->id = id;
    u32 index[3] = {id % grid[0], id / grid[0] % grid[1], id / grid[0] / grid[1]};
    memcpy(program->index, index, sizeof index);
    program->shared.assign(launch.shared_size, 0xff);  // NaN in every format
    program->in_flight.resize(launch.shared_size / 16 + 1);
    if (launch.watch_races) program->writes.resize(launch.shared_size), program->reads.resize(launch.shared_size);
    for (int k = 0; k < launch.num_threads / 32; k++) {
        auto warp = std::make_unique<Warp>();
        warp->program = program.get(), warp->index = k;
        warp->registers.assign(size_t(launch.code->num_rows) * 32, ~u64(0));
        for (auto [row, x] : launch.code->constants) std::fill_n(warp->row(row), 32, x);
        for (auto [row, which] : launch.code->specials)
            for (u32 lane = 0; lane < 32; lane++) {
                u32 values[] = {u32(32 * k) + lane, 0, 0, index[0], index[1], index[2], grid[0], grid[1], grid[2],
                                u32(launch.num_threads), 1, 1, lane};
                warp->row(row)[lane] = values[which];
            }
        program->warps.push_back(std::move(warp));
    }
    return program;
}

// One warp runs for a while, or what all of them wait for happens.
void turn(Program& program) {
    Launch& launch = *program.launch;
    std::vector<Warp*> awake, ready;
    for (auto& w : program.warps)
        if (!w->done && !w->at_barrier) {
            awake.push_back(w.get());
            if (!w->polling) ready.push_back(w.get());
        }
    if (awake.empty()) {
        for (auto& w : program.warps) w->at_barrier = false;
        program.epoch++;
        program.idle = 0;
        return;
    }
    if (ready.empty()) {
        if (!program.tma.empty()) {
            auto job = program.tma.begin() + launch.random(program.tma.size());
            run_tma(program, *job);
            program.tma.erase(job);
            program.idle = 0;
        } else if (++program.idle > 2) {
            fault("program %d: every warp waits, and nothing is under way", program.id);
        }
        for (auto w : awake) w->polling = false;
        return;
    }
    Warp& w = *ready[launch.random(ready.size())];
    u64 steps = launch.random(4) ? UINT64_MAX : 1 + launch.random(50);  // to the next barrier, or only a little
    for (; steps > 0 && !w.done && !w.at_barrier && !w.polling; steps--) {
        const Instruction& i = launch.code->instructions[w.next().at];
        try {
            step(w);
        } catch (Fault& f) {
            fault("%s (%s, line %d of the PTX; program %u, %u, %u, warp %d)", f.what(), launch.code->names[i.name].c_str(),
                  i.line, program.index[0], program.index[1], program.index[2], w.index);
        }
    }
}

u32* one_each_byte(const Range& r) {  // zeros; untouched pages take no memory
    size_t size = 4 * std::max<u64>(r.end - r.begin, 1);
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fault("no memory to watch an argument of %llu bytes", (unsigned long long)(r.end - r.begin));
    return (u32*)p;
}

// ---- for ptx.py ------------------------------------------------------------------------------------------------------

extern "C" {

// stream, for every instruction: name, guard, negated, line, number of rows, rows, number of numbers, numbers.
// names: "handler name" a line. constants, specials: pairs of a row and what is in it.
// Returns nullptr, and says why in error, if an instruction is not known.
void* ptx_load(const s64* stream, s64 length, const char* names, s64 num_rows, const s64* constants, s64 num_constants,
               const s64* specials, s64 num_specials, char* error, s64 error_size) {
    if (handlers.empty()) define_all();
    auto code = std::make_unique<Code>();
    code->num_rows = num_rows;
    std::vector<std::string> kinds;
    std::istringstream lines(names);
    for (std::string kind, name; lines >> kind >> name;) {
        kinds.push_back(kind), code->names.push_back(name);
        if (!handlers.count(kind)) {
            snprintf(error, error_size, "an instruction that is not known: %s", name.c_str());
            return nullptr;
        }
    }
    for (const s64* at = stream; at < stream + length;) {
        Instruction i;
        i.index = code->instructions.size(), i.name = *at++, i.guard = *at++, i.negated = *at++, i.line = *at++;
        i.run = handlers[kinds[i.name]], i.whole_warp = of_whole_warp(kinds[i.name]);
        for (s64 n = *at++; n > 0; n--) i.rows.push_back(*at++);
        for (s64 n = *at++; n > 0; n--) i.numbers.push_back(*at++);
        code->instructions.push_back(std::move(i));
    }
    for (s64 k = 0; k < num_constants; k += 2) code->constants.push_back({constants[k], constants[k + 1]});
    for (s64 k = 0; k < num_specials; k += 2) code->specials.push_back({specials[k], specials[k + 1]});
    return code.release();
}

// ranges: pairs of addresses. resident: programs that run at the same time. counts: of every instruction, added to.
// Returns 0, or 1 with the reason in error.
s64 ptx_launch(const void* code, const s64* grid, s64 num_threads, s64 shared_size, const char* parameters,
               s64 num_bytes, const s64* ranges, s64 num_ranges, s64 seed, s64 resident, s64 watch_races, s64* counts,
               char* error, s64 error_size) {
    Launch launch{(const Code*)code, {u32(grid[0]), u32(grid[1]), u32(grid[2])}, int(num_threads), u32(shared_size),
                  {parameters, parameters + num_bytes}, {}, bool(watch_races), (Counts*)counts, seed * 2654435761u + 88172645463325252u};
    s64 failed = 0;
    try {
        for (s64 k = 0; k < num_ranges; k++) {
            Range r{u64(ranges[2 * k]), u64(ranges[2 * k + 1]), nullptr, nullptr, nullptr};
            if (watch_races) r.writer = one_each_byte(r), r.reader = one_each_byte(r), r.stamp = one_each_byte(r);
            launch.ranges.push_back(r);
        }
        std::vector<int> order(size_t(grid[0]) * grid[1] * grid[2]);
        for (size_t k = 0; k < order.size(); k++) {
            order[k] = k;
            std::swap(order[k], order[launch.random(k + 1)]);
        }
        std::vector<std::unique_ptr<Program>> running;
        while (!order.empty() || !running.empty()) {
            for (; !order.empty() && s64(running.size()) < resident; order.pop_back())
                running.push_back(start(launch, order.back()));
            auto one = running.begin() + launch.random(running.size());
            turn(**one);
            auto& warps = (*one)->warps;
            if (std::all_of(warps.begin(), warps.end(), [](auto& w) { return w->done; })) {
                if (!(*one)->tma.empty()) fault("program %d ends before its copies have come", (*one)->id);
                running.erase(one);
            }
        }
    } catch (Fault& f) {
        snprintf(error, error_size, "%s", f.what());
        failed = 1;
    }
    for (auto& r : launch.ranges)
        for (u32* p : {r.writer, r.reader, r.stamp})
            if (p) munmap(p, 4 * std::max<u64>(r.end - r.begin, 1));
    return failed;
}
}
