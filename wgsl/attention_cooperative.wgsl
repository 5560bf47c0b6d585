// softmax(scale q k^T) v of every head on matrix units, and the statistics of the softmax of every query: Dao et al., arXiv:2205.14135.
//
// A subgroup has {{ lanes }} queries, one per invocation for all that is not a product. WGSL reaches no single elements of a matrix, so scores pass
// through workgroup memory to the invocation of their query, probabilities back, and their products with the values once more: there the
// sums are scaled when the largest score grows. Every invocation has the sums of its query in registers.
//
// Rows in workgroup memory are {{ pad }} (f32: 4) elements apart more than they are long, so that eight rows touch all banks once.
{# Inside: rows of queries, keys and values are clamped to the sample's last, columns of a head to its last. q_row, key, t stay below the tile's rows,
   matrices inside the tile: wide is a multiple of size. Statistics have 2·total elements in two rows of their stride. What is finished belongs to a
   row below q_len; columns are those of the head, or, for the last head, the row's padding. #}
{% set keys = "q" if packed else "kv" %}
{% set lowest = "-3.4028234e38" %}
{% set threads = subgroups * lanes %}
{# Columns of a head that matrices cover, rows in workgroup memory. #}
{% set wide = (4 * d + size - 1) // size * size %}
{% set kv_row = wide + pad %}
{% set p_row = [wide, tile]|max + pad %}
{% set s_cols = tile %}
{% set s_row = s_cols + 4 %}
{% set chunks = (wide + s_cols - 1) // s_cols %}
{# Elements of workgroup memory an index counts: MSL reads matrices from arrays of scalars only. #}
{% set each = 1 if scalar else 4 %}
{% set element = "f16" if scalar else "vec4<f16>" %}
{% set mt = lanes // size %}
{% set nt = tile // size %}
{% set depth = wide // size %}
{% set matrix = "coop_mat" ~ size ~ "x" ~ size %}
var<workgroup> k_tile: array<{{ element }}, {{ tile * kv_row // each }}>;
var<workgroup> v_tile: array<{{ element }}, {{ tile * kv_row // each }}>;
var<workgroup> p_tile: array<{{ element }}, {{ threads * p_row // each }}>;
var<workgroup> s_tile: array<{{ "f32" if scalar else "vec4<f32>" }}, {{ threads * s_row // each }}>;
{% if masked or k_len % tile != 0 %}
var<workgroup> there: array<vec4<u32>, {{ tile // 4 }}>;
{% endif %}
{% macro put(name, at, value) %}
{% if scalar %}
        {
            let place = {{ at }};
            let four = {{ value }};
            {{ name }}[place] = four.x;
            {{ name }}[place + 1u] = four.y;
            {{ name }}[place + 2u] = four.z;
            {{ name }}[place + 3u] = four.w;
        }
{% else %}
        {{ name }}[({{ at }}) / 4u] = {{ value }};
{% endif %}
{% endmacro %}
{% macro four(name, at) %}{% if scalar %}vec4<f32>({{ name }}[{{ at }}], {{ name }}[{{ at }} + 1u], {{ name }}[{{ at }} + 2u], {{ name }}[{{ at }} + 3u]){% else %}{{ name }}[({{ at }}) / 4u]{% endif %}{% endmacro %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{% include "shared/tile" %}
    let batch = wid.z;
    let head = wid.y;
    let begin0 = wid.x * {{ threads }}u;
    let column = head * {{ d }}u;
    let sub_row = subgroup * {{ lanes }}u;
    let own = sub_row + lane;
    let query = begin0 + own;
{# Queries, in the place of the probabilities. Loops are unrolled: all loads are under way before the first one is waited for. #}
{% set q_loads = wide // 4 %}
{% for base in range(0, q_loads, 8) %}
    {
{% for r in range(base, [base + 8, q_loads]|min) %}
        let i{{ r }} = (lid + {{ r * threads }}u) / {{ wide // 4 }}u;
        let c{{ r }} = (lid + {{ r * threads }}u) % {{ wide // 4 }}u;
        let q{{ r }} = q[(batch * {{ q_len }}u + min(begin0 + i{{ r }}, {{ q_len - 1 }}u)) * q_stride + column + {% if wide != 4 * d %}min(c{{ r }}, {{ d - 1 }}u){% else %}c{{ r }}{% endif %}];
{% endfor %}
{% for r in range(base, [base + 8, q_loads]|min) %}
{{ put("p_tile", "i" ~ r ~ " * " ~ p_row ~ "u + 4u * c" ~ r, "q" ~ r if wide == 4 * d else "select(vec4<f16>(), q" ~ r ~ ", c" ~ r ~ " < " ~ d ~ "u)") }}
{% endfor %}
    }
{% endfor %}
    workgroupBarrier();
{% for i in range(mt) %}
{% for u in range(depth) %}
    let q{{ i }}_{{ u }} = coopLoadT<{{ matrix }}<f16, A>>(&p_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size }}u) / {{ each }}u], {{ p_row // each }}u);
{% endfor %}
{% endfor %}
    var largest = {{ lowest }};
    var sum = 0.0;
{% for c in range(wide // 4) %}
    var y{{ c }} = vec4<f32>();
{% endfor %}
    let end = {% if causal %}min(begin0 + {{ threads }}u, {{ k_len }}u){% else %}{{ k_len }}u{% endif %};
    for (var key0 = 0u; key0 < end; key0 += {{ tile }}u) {
        workgroupBarrier();
{% set loads = (tile * wide // 4 + threads - 1) // threads %}
{% set whole = loads * threads == tile * wide // 4 %}
{% for base in range(0, loads, 8) %}
        {
{% for r in range(base, [base + 8, loads]|min) %}
            let t{{ r }} = {% if whole %}lid + {{ r * threads }}u{% else %}min(lid + {{ r * threads }}u, {{ tile * wide // 4 - 1 }}u){% endif %};
            let i{{ r }} = t{{ r }} / {{ wide // 4 }}u;
            let c{{ r }} = t{{ r }} % {{ wide // 4 }}u;
            let row{{ r }} = batch * {{ k_len }}u + min(key0 + i{{ r }}, {{ k_len - 1 }}u);
            let at{{ r }} = row{{ r }} * {{ keys }}_stride + column + {% if wide != 4 * d %}min(c{{ r }}, {{ d - 1 }}u){% else %}c{{ r }}{% endif %};
            let k{{ r }} = {{ keys }}[at{{ r }} + {{ k_first }}u];
            let v{{ r }} = {{ keys }}[at{{ r }} + {{ v_first }}u];
            let counts{{ r }} = key0 + i{{ r }} < {{ k_len }}u{% if masked %} && mask_at(row{{ r }}) != 0.0{% endif %}{% if wide != 4 * d %} && c{{ r }} < {{ d }}u{% endif %};
{% endfor %}
{% for r in range(base, [base + 8, loads]|min) %}
{% if not whole %}
            if (lid + {{ r * threads }}u < {{ tile * wide // 4 }}u) {
{% endif %}
{{ put("k_tile", "i" ~ r ~ " * " ~ kv_row ~ "u + 4u * c" ~ r, "select(vec4<f16>(), k" ~ r ~ ", counts" ~ r ~ ")") }}
{{ put("v_tile", "i" ~ r ~ " * " ~ kv_row ~ "u + 4u * c" ~ r, "select(vec4<f16>(), v" ~ r ~ ", counts" ~ r ~ ")") }}
{% if not whole %}
            }
{% endif %}
{% endfor %}
        }
{% endfor %}
{% if masked or k_len % tile != 0 %}
        if (lid < {{ tile // 4 }}u) {
            var counts = vec4<u32>();
{% for e in range(4) %}
            {
                let key = key0 + 4u * lid + {{ e }}u;
                counts[{{ e }}] = select(0u, 1u, key < {{ k_len }}u{% if masked %} && mask_at(batch * {{ k_len }}u + min(key, {{ k_len - 1 }}u)) != 0.0{% endif %});
            }
{% endfor %}
            there[lid] = counts;
        }
{% endif %}
        workgroupBarrier();
{# Scores of all keys of the tile. #}
{% for j in range(nt) %}
        {
{% for i in range(mt) %}
            var s{{ i }} = {{ matrix }}<f32, C>();
{% endfor %}
{% for u in range(depth) %}
            let k{{ u }} = coopLoad<{{ matrix }}<f16, B>>(&k_tile[{{ (j * size * kv_row + u * size) // each }}], {{ kv_row // each }}u);
{% for i in range(mt) %}
            s{{ i }} = coopMultiplyAdd(q{{ i }}_{{ u }}, k{{ u }}, s{{ i }});
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
            coopStoreT(s{{ i }}, &s_tile[(sub_row * {{ s_row }}u + {{ i * size * s_row + j * size }}u) / {{ each }}u], {{ s_row // each }}u);
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
        let at_own = own * {{ s_row }}u;
        var top = largest;
{% for c in range(tile // 4) %}
{% if masked or causal or k_len % tile != 0 %}
        let seen{{ c }} = {% if masked or k_len % tile != 0 %}there[{{ c }}] != vec4<u32>(){% endif %}{% if causal and (masked or k_len % tile != 0) %} & {% endif %}{% if causal %}(vec4<u32>(0u, 1u, 2u, 3u) + key0 + {{ 4 * c }}u <= vec4<u32>(query)){% endif %};
{% endif %}
        var s{{ c }} = {{ four("s_tile", "at_own + " ~ 4 * c ~ "u") }} * {{ scale }};
{% if masked or causal or k_len % tile != 0 %}
        s{{ c }} = select(vec4<f32>({{ lowest }}), s{{ c }}, seen{{ c }});
{% endif %}
        top = max(top, max(max(s{{ c }}.x, s{{ c }}.y), max(s{{ c }}.z, s{{ c }}.w)));
{% endfor %}
        let fade = exp(largest - top);
        largest = top;
        var part = vec4<f32>();
{% for c in range(tile // 4) %}
        {
{% if masked or causal or k_len % tile != 0 %}
            let p = select(vec4<f32>(), exp(s{{ c }} - top), seen{{ c }});
{% else %}
            let p = exp(s{{ c }} - top);
{% endif %}
            part += p;
{{ put("p_tile", "own * " ~ p_row ~ "u + " ~ 4 * c ~ "u", "vec4<f16>(p)") }}
        }
{% endfor %}
        sum = sum * fade + ((part.x + part.y) + (part.z + part.w));
        workgroupBarrier();
{# What they add, as many columns at a time as scores have. #}
{% for u in range(nt) %}
{% for i in range(mt) %}
        let p{{ i }}_{{ u }} = coopLoadT<{{ matrix }}<f16, A>>(&p_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size }}u) / {{ each }}u], {{ p_row // each }}u);
{% endfor %}
{% endfor %}
{% for chunk in range(chunks) %}
{% set cols = [s_cols, wide - chunk * s_cols]|min %}
{% if chunk > 0 %}
        workgroupBarrier();
{% endif %}
{% for n in range(cols // size) %}
        {
{% for i in range(mt) %}
            var o{{ i }} = {{ matrix }}<f32, C>();
{% endfor %}
{% for u in range(nt) %}
            let v{{ u }} = coopLoadT<{{ matrix }}<f16, B>>(&v_tile[{{ (u * size * kv_row + chunk * s_cols + n * size) // each }}], {{ kv_row // each }}u);
{% for i in range(mt) %}
            o{{ i }} = coopMultiplyAdd(p{{ i }}_{{ u }}, v{{ u }}, o{{ i }});
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
            coopStoreT(o{{ i }}, &s_tile[(sub_row * {{ s_row }}u + {{ i * size * s_row + n * size }}u) / {{ each }}u], {{ s_row // each }}u);
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
{% for c in range(cols // 4) %}
        y{{ chunk * s_cols // 4 + c }} = y{{ chunk * s_cols // 4 + c }} * fade + {{ four("s_tile", "at_own + " ~ 4 * c ~ "u") }};
{% endfor %}
{% endfor %}
    }
    let inverse = select(1.0 / sum, 0.0, sum == 0.0);
{# Results pass through workgroup memory, so that neighbours store neighbouring columns. #}
{% for chunk in range(chunks) %}
{% set cols = [s_cols, 4 * d - chunk * s_cols]|min %}
    workgroupBarrier();
{% for c in range(cols // 4) %}
    {
        let y = y{{ chunk * s_cols // 4 + c }} * inverse;
{{ put("s_tile", "own * " ~ s_row ~ "u + " ~ 4 * c ~ "u", "y") }}
    }
{% endfor %}
    workgroupBarrier();
{% for r in range(cols // 4) %}
    {
        let i = (lid + {{ r * threads }}u) / {{ cols // 4 }}u;
        let c = (lid + {{ r * threads }}u) % {{ cols // 4 }}u;
        let at = i * {{ s_row }}u + 4u * c;
        if (begin0 + i < {{ q_len }}u) {
            finish(batch * {{ q_len }}u + begin0 + i, column + {{ chunk * s_cols // 4 }}u + c, {{ four("s_tile", "at") }});
        }
    }
{% endfor %}
{% endfor %}
    if (query >= {{ q_len }}u) {
        return;
    }
    let n = (batch * {{ heads }}u + head) * {{ q_len }}u + query;
    stats_put(n, select(largest, 0.0, sum == 0.0));
    stats_put(stats_stride + n, inverse);
    if (n == {{ total - 1 }}u) {
        for (var i = {{ total }}u; i < stats_stride; i++) {
            stats_put(i, 0.0);
            stats_put(stats_stride + i, 0.0);
        }
    }
{% if heads * d < width %}
    if (head == {{ heads - 1 }}u) {
        for (var i = {{ heads * d }}u; i < {{ width }}u; i++) {
            finish(batch * {{ q_len }}u + query, i, vec4<f32>());
        }
    }
{% endif %}
}
