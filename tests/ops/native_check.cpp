// Every compiled kernel against plain loops in double, on shapes that are no multiples of any block size, with 1 and 3
// threads, which must give equal bits. test_native_check.py builds this for each vector width and sanitizer.
//
// Every buffer is a heap allocation of exactly its size, so that AddressSanitizer reports an overrun by one float.
// Results start as NaN, so that an element that is never written fails. Axes are those of kernels.cpp. With XUSHI_BF16
// tensors are bfloat16.

#include "kernels.cpp"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace check {

// A value in double, and its size: how large it would be if no terms cancelled. Float32 rounds each step by 2^-24 of
// the step's own size, so the bound on a kernel's error is 2^-24 * number of steps * size. The value itself cannot be
// the measure, since cancellation can make it arbitrarily small. A function multiplies the size by its slope and adds
// the size of its result.
struct Exact {
    double value, size;
    Exact(double value = 0) : value(value), size(std::fabs(value)) {}
    Exact(double value, double size) : value(value), size(size) {}
};
typedef std::vector<float> Floats;
typedef std::vector<Exact> Exacts;
typedef std::vector<Floats> Results;

Exact operator+(Exact a, Exact b) { return {a.value + b.value, a.size + b.size}; }
Exact operator-(Exact a, Exact b) { return {a.value - b.value, a.size + b.size}; }
Exact operator*(Exact a, Exact b) { return {a.value * b.value, a.size * b.size}; }
Exact operator/(Exact a, Exact b) {
    const double value = a.value / b.value;
    return {value, (a.size + std::fabs(value) * b.size) / std::fabs(b.value)};
}
Exact power(Exact a) { return {std::exp(a.value), std::exp(a.value) * (1 + a.size)}; }
Exact logarithm(Exact a) { return {std::log(a.value), std::fabs(std::log(a.value)) + a.size / a.value}; }
Exact root(Exact a) { return {std::sqrt(a.value), std::sqrt(a.value) + a.size / (2 * std::sqrt(a.value))}; }
Exact logistic(Exact a) {
    const double value = 1 / (1 + std::exp(-a.value));
    return {value, value + value * (1 - value) * a.size};
}

template <class Term>
Exact sum(Int begin, Int end, Term term) {
    Exact result;
    for (Int i = begin; i < end; i++) result = result + term(i);
    return result;
}

template <class Cell>
Exacts table(Int rows, Int columns, Cell cell) {
    Exacts result;
    result.reserve(rows * columns);
    for (Int i = 0; i < rows; i++)
        for (Int j = 0; j < columns; j++) result.push_back(cell(i, j));
    return result;
}

uint64_t state = 1;
uint32_t next_bits() { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 40; }
Floats made(Int count, float low = -1, float high = 1) {
    Floats result(count);
    for (float& value : result) value = low + (high - low) * (next_bits() / 16777216.0f);
    return result;
}
Floats empty(Int count) { return Floats(count, NAN); }

std::string shape;  // of the running check, for the message on failure
Int checks = 0;

void require(bool good, const char* what, Int place) {
    if (good) return;
    std::printf("%s is wrong at %lld for %s\n", what, static_cast<long long>(place), shape.c_str());
    std::exit(1);
}

template <class... Sizes>
void name(const char* kernel, Sizes... sizes) {
    shape = kernel;
    for (double size : std::vector<double>{static_cast<double>(sizes)...}) {
        char text[32];
        std::snprintf(text, sizeof text, " %g", size);
        shape += text;
    }
}

// If the kernels take bfloat16, tensors are floats that bfloat16 can represent exactly, and these pass bfloat16 copies.
struct Tensor {
    std::vector<Value> values;
    Floats* target;  // receives what the kernel wrote; null for an input
    Tensor(const Floats& floats, Floats* target) : values(floats.size()), target(target) {
        map(values.data(), floats.data(), floats.size(), [](Int, Vec v) { return v; });
    }
    ~Tensor() {
        if (target != nullptr) map(target->data(), values.data(), values.size(), [](Int, Vec v) { return v; });
    }
};
constexpr Int HALF = PAIR == 2;
Tensor from(const Floats& floats) { return {floats, nullptr}; }
Tensor into(Floats& floats) { return {floats, &floats}; }
Floats made_tensor(Int count, float low = -1, float high = 1) {
    Floats result = made(count, low, high);
    into(result);  // converts to bfloat16 and back, which rounds
    return result;
}

// `terms`: the total length of the sums that lead to a result; 64 more are allowed for other operations. A term missing
// from a sum causes an error of about size / terms, many times the bound. 1e-30 covers the clamp of e^x in a kernel.
// `halves`: how many of the values that lead to a result were rounded to bfloat16, by 2^-8 each.
void expect(const char* what, const Floats& got, const Exacts& want, Int terms, Int halves = 0) {
    checks++;
    require(got.size() == want.size(), what, -1);
    for (size_t i = 0; i < got.size(); i++) {
        const double bound = ((terms + 64) * 0x1p-23 + HALF * halves * 0x1p-8) * want[i].size + 1e-30;
        if (std::fabs(got[i] - want[i].value) <= bound) continue;  // false for NaN
        std::printf("got %.9g, want %.9g within %.2g: ", got[i], want[i].value, bound);
        require(false, what, i);
    }
}

template <class T> T* passed(std::vector<T>& buffer) { return buffer.data(); }
template <class T> const T* passed(const std::vector<T>& buffer) { return buffer.data(); }
Value* passed(Tensor& tensor) { return tensor.values.data(); }
template <class T> T passed(const T& number) { return number; }

// One thread: a new one, whose scratch memory is exactly as large as the kernel asks for, so that AddressSanitizer sees
// an overrun of it too. Several threads: their scratch memory holds values of earlier calls, which must not be read.
template <class Kernel, class... Arguments>
void call(Int threads, Kernel kernel, Arguments&&... arguments) {
    if (threads > 1) kernel(passed(arguments)..., threads);
    else std::thread([&] { kernel(passed(arguments)..., threads); }).join();
}

template <class Calls>
Results with_threads(Calls calls) {
    const Results alone = calls(Int{1}), together = calls(Int{3});
    for (size_t i = 0; i < alone.size(); i++)
        require(std::memcmp(alone[i].data(), together[i].data(), alone[i].size() * sizeof(float)) == 0,
                "the same bits with 3 threads: result", i);
    return alone;
}

void linear(Int m, Int n, Int k) {
    name("linear m n k", m, n, k);
    const Floats x = made_tensor(m * k), w = made(n * k), dy = made_tensor(m * n);
    const Results got = with_threads([&](Int threads) {
        Results out{empty(m * n), empty(m * k), empty(n * k)};
        call(threads, xushi_linear, from(x), w, into(out[0]), m, n, k);
        call(threads, xushi_linear_input, from(dy), w, into(out[1]), m, n, k);
        call(threads, xushi_linear_weight, from(dy), from(x), out[2], m, n, k);
        return out;
    });
    auto cell = [](Int count, const float* a, Int a_step, const float* b, Int b_step) {
        return sum(0, count, [&](Int t) { return Exact(a[t * a_step]) * b[t * b_step]; });
    };
    expect("y", got[0], table(m, n, [&](Int i, Int j) { return cell(k, &x[i * k], 1, &w[j * k], 1); }), k, 2);
    expect("dx", got[1], table(m, k, [&](Int i, Int j) { return cell(n, &dy[i * n], 1, &w[j], k); }), n, 2);
    expect("dw", got[2], table(n, k, [&](Int i, Int j) { return cell(m, &dy[i], n, &x[j], k); }), m);
}

struct Gated {  // silu(gate) * up with the clamp, and its slopes
    Exact value, by_gate, by_up;
};
Gated gated(double gate, double up, double limit) {
    const bool high = limit > 0 && gate > limit, outside = limit > 0 && std::fabs(up) > limit;
    const Exact g = high ? limit : gate, u = outside ? std::copysign(limit, up) : up, s = logistic(g);
    return {g * s * u, high ? Exact(0) : u * s * (1 + g * (1 - s)), outside ? Exact(0) : g * s};
}

void swiglu(Int n, Int width, float limit) {
    name("swiglu n width limit", n, width, limit);
    const float reach = n % 2 == 0 ? 120.0f : 4.0f;  // e^120 overflows a float
    const Floats gate = made_tensor(n * width, -reach, reach), up = made_tensor(n * width, -4, 4);
    const Floats da = made_tensor(n * width);
    const Results got = with_threads([&](Int threads) {
        Results out{empty(n * width), empty(n * width), empty(n * width)};
        call(threads, xushi_swiglu, from(gate), from(up), into(out[0]), n, width, limit);
        call(threads, xushi_swiglu_backward, from(gate), from(up), from(da), into(out[1]), into(out[2]), n, width,
             limit);
        return out;
    });
    auto at = [&](Int i) { return gated(gate[i], up[i], limit); };
    expect("out", got[0], table(1, n * width, [&](Int, Int i) { return at(i).value; }), 0, 1);
    expect("d_gate", got[1], table(1, n * width, [&](Int, Int i) { return da[i] * at(i).by_gate; }), 0, 1);
    expect("d_up", got[2], table(1, n * width, [&](Int, Int i) { return da[i] * at(i).by_up; }), 0, 1);
}

void rms_norm(Int n, Int width) {
    name("rms_norm n width", n, width);
    const float eps = 1e-6f;
    const Floats x = made_tensor(n * width), weight = made(width), dy = made_tensor(n * width);
    const Results got = with_threads([&](Int threads) {
        Results out{empty(n * width), empty(n), empty(n * width), empty(width)};
        call(threads, xushi_rms_norm, from(x), weight, into(out[0]), out[1], n, width, eps);
        call(threads, xushi_rms_norm_backward, from(x), weight, out[1], from(dy), into(out[2]), out[3], n, width);
        return out;
    });
    const Exacts scale = table(n, 1, [&](Int r, Int) {
        return 1 / root(sum(r * width, r * width + width, [&](Int i) { return Exact(x[i]) * x[i]; }) / width + eps);
    });
    expect("rstd", got[1], scale, width);
    expect("y", got[0], table(n, width, [&](Int r, Int i) { return x[r * width + i] * scale[r] * weight[i]; }), width,
           1);
    const Exacts dots = table(n, 1, [&](Int r, Int) {
        return sum(0, width, [&](Int i) { return Exact(dy[r * width + i]) * weight[i] * x[r * width + i]; }) / width;
    });
    expect("dx", got[2], table(n, width, [&](Int r, Int i) {
        const Exact s = got[1][r];  // the backward pass reads the rounded value
        return s * (Exact(dy[r * width + i]) * weight[i] - x[r * width + i] * s * s * dots[r]);
    }), width, 1);
    expect("d_weight", got[3], table(1, width, [&](Int, Int i) {
        return sum(0, n, [&](Int r) { return Exact(dy[r * width + i]) * x[r * width + i] * got[1][r]; });
    }), n);
}

// The first sequence is one document, the others hold several. k is laid out as [B, H, T, K], or a single head is used
// for all (stride 0); v is a view of a tensor whose last axis is longer by `wider`.
void attention(Int B, Int T, Int H, Int K, Int V, float scale, bool one_head, Int wider) {
    name("attention B T H K V scale one_head wider", B, T, H, K, V, scale, one_head, wider);
    const Int heads = one_head ? 1 : H, wide = V + wider;
    const Floats q = made_tensor(B * T * H * K), k = made_tensor(B * T * heads * K);
    const Floats v = made_tensor((B * T * H - 1) * wide + V), d_out = made_tensor(B * T * H * V);
    const std::vector<Int> strides{T * H * K, H * K, K, heads * T * K, K, one_head ? 0 : T * K, T * H * wide, H * wide,
                                   wide};
    std::vector<int32_t> starts(B * T);
    for (Int b = 1; b < B; b++)
        for (Int t = 1; t < T; t++) starts[b * T + t] = next_bits() % 50 == 0 ? t : starts[b * T + t - 1];
    const Results got = with_threads([&](Int threads) {
        Results out{empty(B * T * H * V), empty(B * H * T), empty(B * T * H * K), empty(B * T * H * K),
                    empty(B * T * H * V)};
        call(threads, xushi_attention, from(q), from(k), from(v), strides, starts, into(out[0]), out[1], B, T, H, K, V,
             scale);
        call(threads, xushi_attention_backward, from(q), from(k), from(v), strides, starts, from(out[0]), out[1],
             from(d_out), into(out[2]), into(out[3]), into(out[4]), B, T, H, K, V, scale);
        return out;
    });
    Exacts out(B * T * H * V), lse(B * H * T), dq(B * T * H * K), dk(B * T * H * K), dv(B * T * H * V);
    for (Int task = 0; task < B * H * T; task++) {
        const Int b = task / (H * T), h = task / T % H, t = task % T, row = (b * T + t) * H + h;
        const Int start = starts[b * T + t];
        const float rounded = got[1][task];  // the backward pass reads this and `out`
        auto key = [&](Int s) { return &k[b * strides[3] + s * strides[4] + h * strides[5]]; };
        auto value = [&](Int s) { return &v[b * strides[6] + s * strides[7] + h * strides[8]]; };
        const Exacts scores = table(1, t + 1 - start, [&](Int, Int i) {
            return scale * sum(0, K, [&](Int j) { return Exact(q[row * K + j]) * key(start + i)[j]; });
        });
        const Exact norm = sum(start, t + 1, [&](Int s) { return power(scores[s - start]); });
        const Exact mean = sum(row * V, row * V + V, [&](Int i) { return Exact(got[0][i]) * d_out[i]; });
        lse[task] = logarithm(norm);
        for (Int s = start; s <= t; s++) {
            const Int to = (b * T + s) * H + h;
            const Exact share = power(scores[s - start]) / norm, weight = power(scores[s - start] - rounded);
            const Exact d_weight = sum(0, V, [&](Int j) { return Exact(d_out[row * V + j]) * value(s)[j]; });
            const Exact d_score = weight * (d_weight - mean) * scale;
            for (Int j = 0; j < V; j++) out[row * V + j] = out[row * V + j] + share * value(s)[j];
            for (Int j = 0; j < V; j++) dv[to * V + j] = dv[to * V + j] + weight * d_out[row * V + j];
            for (Int j = 0; j < K; j++) dq[row * K + j] = dq[row * K + j] + d_score * key(s)[j];
            for (Int j = 0; j < K; j++) dk[to * K + j] = dk[to * K + j] + d_score * q[row * K + j];
        }
    }
    expect("out", got[0], out, T + K, 2);
    expect("lse", got[1], lse, T + K);
    expect("dq", got[2], dq, T + K + V, 2);
    expect("dk", got[3], dk, T + K + V, 2);
    expect("dv", got[4], dv, T + K, 2);
}

// The shared key is a view of rows that are longer by 5.
void heads(Int M, Int H, Int N, Int R, Int V, bool interleaved) {
    name("heads M H N R V interleaved", M, H, N, R, V, interleaved);
    const Int ld = R + 5, K = N + R, W = N + V, half = R / 2;
    const Floats q = made_tensor(M * H * K), kv = made_tensor(M * H * W), k_rope = made_tensor((M - 1) * ld + R);
    const Floats cos = made(M * half), sin = made(M * half);
    const Floats dq = made_tensor(M * H * K), dk = made_tensor(M * H * K), dv = made_tensor(M * H * V);
    const Int flag = interleaved;
    const Results got = with_threads([&](Int threads) {
        Results out{empty(M * H * K), empty(M * H * K), empty(M * H * K), empty(M * H * W), empty(M * R)};
        call(threads, xushi_heads, from(q), from(kv), from(k_rope), ld, cos, sin, into(out[0]), into(out[1]), M, H, N, R,
             V, flag);
        call(threads, xushi_heads_backward, from(dq), from(dk), from(dv), cos, sin, into(out[2]), into(out[3]),
             into(out[4]), M, H, N, R, V, flag);
        return out;
    });
    // The places of the first and second value of pair i before the rotation.
    auto first = [&](Int i) { return interleaved ? 2 * i : i; };
    auto second = [&](Int i) { return interleaved ? 2 * i + 1 : i + half; };
    Exacts queries(M * H * K), keys(M * H * K), d_q(M * H * K), d_kv(M * H * W), d_rope(M * R);
    for (Int m = 0; m < M; m++) {
        for (Int i = 0; i < half; i++) {
            const Exact c = cos[m * half + i], s = sin[m * half + i];
            Exact d_low, d_high;
            for (Int h = m * H; h < m * H + H; h++) {
                const float *x = &q[h * K + N], *y = &k_rope[m * ld], *g = &dq[h * K + N];
                queries[h * K + N + i] = c * x[first(i)] - s * x[second(i)];
                queries[h * K + N + half + i] = c * x[second(i)] + s * x[first(i)];
                keys[h * K + N + i] = c * y[first(i)] - s * y[second(i)];
                keys[h * K + N + half + i] = c * y[second(i)] + s * y[first(i)];
                d_q[h * K + N + first(i)] = c * g[i] + s * g[half + i];
                d_q[h * K + N + second(i)] = c * g[half + i] - s * g[i];
                d_low = d_low + dk[h * K + N + i];
                d_high = d_high + dk[h * K + N + half + i];
            }
            d_rope[m * R + first(i)] = c * d_low + s * d_high;
            d_rope[m * R + second(i)] = c * d_high - s * d_low;
        }
        for (Int h = m * H; h < m * H + H; h++) {
            for (Int j = 0; j < N; j++) {
                queries[h * K + j] = q[h * K + j];
                keys[h * K + j] = kv[h * W + j];
                d_q[h * K + j] = dq[h * K + j];
                d_kv[h * W + j] = dk[h * K + j];
            }
            for (Int j = 0; j < V; j++) d_kv[h * W + N + j] = dv[h * V + j];
        }
    }
    expect("queries", got[0], queries, 0, 1);
    expect("keys", got[1], keys, 0, 1);
    expect("dq", got[2], d_q, 0, 1);
    expect("d_kv", got[3], d_kv, 0, 0);
    expect("d_k_rope", got[4], d_rope, H, 1);
}

// Every token's first choice is the same expert, so that it has more rows than a task takes; of 8 experts some have
// none.
void experts(Int N, Int k, Int D, Int F, Int E, float limit) {
    name("experts N k D F E limit", N, k, D, F, E, limit);
    const Int P = N * k;
    std::vector<Int> indices(P);
    for (Int i = 0; i < P; i++) indices[i] = i % k == 0 ? E / 2 : (E / 2 + 2 * (i % k) - next_bits() % 2) % E;
    std::vector<int32_t> rows(P, -1), place(P, -1), bounds(E + 1, -1);
    xushi_sort_by_expert(indices.data(), P, E, rows.data(), place.data(), bounds.data());
    Int row = 0;
    for (Int e = 0; e <= E; e++) {
        require(bounds[e] == row, "bounds", e);
        for (Int i = 0; i < P; i++) {
            if (indices[i] != e) continue;
            require(rows[row] == i && place[i] == row, "the sorted row", row);
            row++;
        }
    }
    checks++;

    const Floats x = made_tensor(N * D), weights = made(P), gate_up = made(E * 2 * F * D), down = made(E * D * F);
    const Floats d_out = made_tensor(N * D);
    const Results got = with_threads([&](Int threads) {
        Results out{empty(P * 2 * F), empty(N * D), empty(N * D), empty(P), empty(E * 2 * F * D), empty(E * D * F)};
        call(threads, xushi_experts, from(x), weights, gate_up, down, rows, place, bounds, into(out[0]), into(out[1]),
             N, k, D, F, E, limit);
        call(threads, xushi_experts_backward, from(x), weights, gate_up, down, rows, place, bounds, from(out[0]),
             from(d_out), into(out[2]), out[3], out[4], out[5], N, k, D, F, E, limit);
        return out;
    });
    // Once the kernel's gate and up products are checked, the rest is compared from them: near the clamp, a rounding
    // difference would change the slope from 1 to 0.
    const Floats& h = got[0];
    auto expert = [&](Int r) { return indices[rows[r]]; };
    auto token = [&](Int r) { return rows[r] / k; };
    expect("h", h, table(P, 2 * F, [&](Int r, Int j) {
        const float *a = &x[token(r) * D], *b = &gate_up[(expert(r) * 2 * F + j) * D];
        return sum(0, D, [&](Int t) { return Exact(a[t]) * b[t]; });
    }), D, 2);
    std::vector<Gated> acts;
    for (Int r = 0; r < P; r++)
        for (Int f = 0; f < F; f++) acts.push_back(gated(h[r * 2 * F + f], h[r * 2 * F + F + f], limit));
    const Exacts y = table(P, D, [&](Int r, Int d) {
        return sum(0, F, [&](Int f) { return acts[r * F + f].value * down[(expert(r) * D + d) * F + f]; });
    });
    expect("out", got[1], table(N, D, [&](Int n, Int d) {
        return sum(n * k, n * k + k, [&](Int i) { return weights[i] * y[place[i] * D + d]; });
    }), F + k, 3);

    const Exacts da = table(P, F, [&](Int r, Int f) {
        return sum(0, D, [&](Int d) { return Exact(d_out[token(r) * D + d]) * down[(expert(r) * D + d) * F + f]; });
    });
    const Exacts dh = table(P, 2 * F, [&](Int r, Int j) {
        const Gated& act = acts[r * F + j % F];
        return weights[rows[r]] * da[r * F + j % F] * (j < F ? act.by_gate : act.by_up);
    });
    const Exacts dx_rows = table(P, D, [&](Int r, Int d) {
        return sum(0, 2 * F, [&](Int j) { return dh[r * 2 * F + j] * gate_up[(expert(r) * 2 * F + j) * D + d]; });
    });
    expect("dx", got[2], table(N, D, [&](Int n, Int d) {
        return sum(n * k, n * k + k, [&](Int i) { return dx_rows[place[i] * D + d]; });
    }), D + 2 * F + k, 4);
    expect("d_weights", got[3], table(P, 1, [&](Int i, Int) {
        return sum(place[i] * F, place[i] * F + F, [&](Int j) { return da[j] * acts[j].value; });
    }), D + F, 1);
    expect("d_gate_up", got[4], table(E * 2 * F, D, [&](Int i, Int d) {
        const Int e = i / (2 * F), j = i % (2 * F);
        return sum(bounds[e], bounds[e + 1], [&](Int r) { return dh[r * 2 * F + j] * x[token(r) * D + d]; });
    }), D + N, 2);
    expect("d_down", got[5], table(E * D, F, [&](Int i, Int f) {
        const Int e = i / D, d = i % D;
        return sum(bounds[e], bounds[e + 1], [&](Int r) {
            return Exact(d_out[token(r) * D + d]) * weights[rows[r]] * acts[r * F + f].value;
        });
    }), N, 1);
}

void cross_entropy(Int N, Int D, Int V, float reach) {
    name("cross_entropy N D V reach", N, D, V, reach);
    const Floats x = made_tensor(N * D, -reach, reach), head = made(V * D), weights = made(N, 0, 1);
    std::vector<Int> targets(N);
    for (Int n = 0; n < N; n++) targets[n] = n == 0 ? V - 1 : next_bits() % V;
    const Results got = with_threads([&](Int threads) {
        Results out{empty(N), empty(N * D), empty(V * D), empty(N)};
        call(threads, xushi_cross_entropy, from(x), head, targets, weights, out[0], into(out[1]), out[2], N, D, V);
        call(threads, xushi_cross_entropy, from(x), head, targets, nullptr, out[3], nullptr, nullptr, N, D, V);
        return out;
    });
    Exacts losses, dx(N * D), d_head(V * D);
    for (Int n = 0; n < N; n++) {
        const Exacts logits = table(1, V, [&](Int, Int v) {
            return sum(0, D, [&](Int d) { return Exact(x[n * D + d]) * head[v * D + d]; });
        });
        const Exacts powers = table(1, V, [&](Int, Int v) { return power(logits[v]); });
        const Exact norm = sum(0, V, [&](Int v) { return powers[v]; });
        losses.push_back(logarithm(norm) - logits[targets[n]]);
        for (Int v = 0; v < V; v++) {
            const Exact d_logit = weights[n] * (powers[v] / norm - (v == targets[n] ? 1 : 0));
            for (Int d = 0; d < D; d++) dx[n * D + d] = dx[n * D + d] + d_logit * head[v * D + d];
            for (Int d = 0; d < D; d++) d_head[v * D + d] = d_head[v * D + d] + d_logit * x[n * D + d];
        }
    }
    require(std::memcmp(got[0].data(), got[3].data(), N * sizeof(float)) == 0, "losses alone", 0);
    expect("losses", got[0], losses, D + V / 4, 1);  // the norm is summed in 4 lanes or more
    expect("dx", got[1], dx, D + V + V / 4, 4);
    expect("d_head", got[2], d_head, D + N + V / 4, 2);
}

void adamw(Int count) {
    name("adamw count", count);
    const float rate = 0.1f, beta1 = 0.9f, beta2 = 0.99f, correction2 = 0.3f, eps = 1e-3f, decay = 0.01f;
    const Floats parameter = made(count), gradient = made(count), mean = made(count), square = made(count, 0, 1);
    const Results got = with_threads([&](Int threads) {
        Results out{parameter, mean, square};
        call(threads, xushi_adamw, out[0], gradient, out[1], out[2], count, rate, beta1, beta2, correction2, eps,
             decay);
        return out;
    });
    Exacts parameters, means, squares;
    for (Int i = 0; i < count; i++) {
        means.push_back(mean[i] + (1 - Exact(beta1)) * (Exact(gradient[i]) - mean[i]));
        squares.push_back(beta2 * Exact(square[i]) + (1 - Exact(beta2)) * gradient[i] * gradient[i]);
        parameters.push_back(parameter[i] * (1 - Exact(decay)) -
                             rate * means[i] / (root(squares[i]) / correction2 + eps));
    }
    expect("parameter", got[0], parameters, 0);
    expect("mean", got[1], means, 0);
    expect("square", got[2], squares, 0);
}

void newton_schulz(Int n, Int rows, Int columns) {
    name("newton_schulz", n, rows, columns);
    const float a = 3.4445f, b = -4.775f, c = 2.0315f, largest = 1 / std::sqrt(static_cast<float>(rows * columns));
    const Floats x = made(n * rows * columns, -largest, largest);
    const Results got = with_threads([&](Int threads) {
        Results out{x};
        call(threads, xushi_newton_schulz, out[0], n, rows, columns, a, b, c, 2);
        return out;
    });
    Exacts all;
    for (Int i = 0; i < n; i++) {
        Exacts now = table(rows, columns, [&](Int r, Int k) { return Exact(x[(i * rows + r) * columns + k]); });
        for (int step = 0; step < 2; step++) {
            const Exacts gram = table(rows, rows, [&](Int r, Int s) {
                return sum(0, columns, [&](Int k) { return now[r * columns + k] * now[s * columns + k]; });
            });
            const Exacts mix = table(rows, rows, [&](Int r, Int s) {
                return b * gram[r * rows + s] +
                       c * sum(0, rows, [&](Int k) { return gram[r * rows + k] * gram[k * rows + s]; });
            });
            now = table(rows, columns, [&](Int r, Int k) {
                return a * now[r * columns + k] +
                       sum(0, rows, [&](Int s) { return mix[r * rows + s] * now[s * columns + k]; });
            });
        }
        all.insert(all.end(), now.begin(), now.end());
    }
    // A step has five products, each with the errors of its sums; six factors of a step are rounded to bfloat16.
    expect("x", got[0], all, 2 * (2 * columns + 3 * rows) * 5, 5 * 6 + 6);
}

// Of two concurrent callers one uses the pool and the other runs alone: both must get equal bits.
void two_callers() {
    name("two callers");
    const Int m = 301, n = 50, k = 33;
    const Floats x = made(m * k), w = made(n * k);
    auto work = [&](Results& out) {
        Tensor input = from(x);
        for (Floats& y : out) xushi_linear(passed(input), w.data(), into(y).values.data(), m, n, k, 3);
    };
    Results left(20, empty(m * n)), right(20, empty(m * n));
    std::thread other([&] { work(left); });
    work(right);
    other.join();
    for (const Results& results : {left, right})
        for (const Floats& y : results)
            require(std::memcmp(y.data(), left[0].data(), y.size() * sizeof(float)) == 0, "y", 0);
    checks++;
}

}  // namespace check

int main() {
    using namespace check;
    if (!xushi_granted()) {
        std::printf("the system does not grant the registers of AMX\n");
        return 1;
    }
    // Sizes just below, just above and far from multiples of the widths of vectors and tiles.
    const std::vector<Int> rows{1, 5, 97, 301}, widths{1, 3, 17, 31, 50, 133};
    for (Int m : {1, 5, 97})
        for (Int n : widths)
            for (Int k : widths) check::linear(m, n, k);
    for (auto [m, n, k] : {std::array<Int, 3>{301, 50, 133}, {301, 133, 31}, {97, 530, 3}, {301, 3, 530}, {530, 17, 5},
                           {530, 521, 1}, {1, 1, 701}})
        check::linear(m, n, k);  // several tasks, blocks of columns and blocks of depth
    for (Int n : {1, 5, 98, 301})
        for (Int width : widths)
            for (float limit : {0.0f, 1.5f}) check::swiglu(n, width, limit);
    for (Int n : rows)
        for (Int width : widths) check::rms_norm(n, width);
    check::rms_norm(2501, 3);  // groups of more than 64 rows
    for (Int T : {1, 17, 63, 65, 131}) {
        check::attention(2, T, 3, 33, 17, 0.2f, false, 5);
        check::attention(3, T, 1, 3, 31, 1.0f, true, 0);
        check::attention(1, T, 2, 133, 1, 0.1f, true, 1);
        check::attention(2, T, 2, 1, 50, 30.0f, false, 7);  // the largest score changes between blocks; e^x underflows
        check::attention(2, T, 1, 31, 15, 0.3f, false, 0);
    }
    check::attention(2, 530, 2, 7, 3, 0.5f, false, 3);  // more keys than one block has
    check::attention(1, 1051, 1, 3, 5, 9.0f, true, 0);
    for (Int M : rows)
        for (bool interleaved : {false, true}) {
            check::heads(M, 1, 1, 2, 1, interleaved);
            check::heads(M, 3, 17, 6, 31, interleaved);
            check::heads(M, 2, 50, 34, 17, interleaved);
        }
    for (float limit : {0.0f, 1.5f}) {
        for (Int N : rows) {
            check::experts(N, 1, 17, 3, 1, limit);
            check::experts(N, 2, 31, 50, 3, limit);
            check::experts(N, 3, 50, 17, 8, limit);
        }
        check::experts(97, 3, 1, 133, 8, limit);
        check::experts(301, 2, 133, 1, 8, limit);
    }
    check::experts(3, 2, 701, 690, 3, 0);  // large experts, which need two waves
    for (Int N : rows)
        for (Int V : {7, 100, 301}) {
            check::cross_entropy(N, 17, V, 1);
            check::cross_entropy(N, 3, V, HALF ? 4 : 60);  // the bound on e^x is of first order in the error of x
        }
    check::cross_entropy(130, 133, 50, 1);
    check::cross_entropy(97, 31, 31, 1);
    check::cross_entropy(97, 3, 22001, 1);  // a vocabulary so large that rows need two chunks
    for (Int count : {1, 17, 301, 131101}) check::adamw(count);
    for (Int n : {1, 3})
        for (auto [rows, columns] : {std::array<Int, 2>{1, 1}, {1, 17}, {7, 7}, {31, 50}, {97, 101}})
            check::newton_schulz(n, rows, columns);
    two_callers();
    std::printf("ok %lld checks\n", static_cast<long long>(checks));
}
